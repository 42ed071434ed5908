//! Which web pages may connect.
//!
//! A browser sends the origin of the page with every WebSocket, and lets any page open one. Without this check any site that a user visits could
//! chat in their name: with a server on their machine, or with their client certificate. Programs other than browsers send no origin.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// An origin as browsers write it: scheme, host, and a port if it is not the scheme's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    scheme: String,
    host: Host,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    Address(IpAddr),
    Name(String),
}

impl Host {
    fn is_loopback(&self) -> bool {
        match self {
            Self::Address(address) => address.to_canonical().is_loopback(),
            Self::Name(name) => name == "localhost" || name.ends_with(".localhost"),
        }
    }
}

impl FromStr for Origin {
    type Err = String;

    fn from_str(origin: &str) -> Result<Self, String> {
        let (scheme, authority) = origin
            .split_once("://")
            .ok_or_else(|| format!("{origin:?} is no origin, such as https://chat.example.org"))?;
        let is_scheme = scheme.starts_with(|first: char| first.is_ascii_alphabetic())
            && scheme.chars().all(|each| each.is_ascii_alphanumeric() || "+-.".contains(each));
        if !is_scheme {
            return Err(format!("{origin:?} does not begin with a scheme, such as https://"));
        }
        let scheme = scheme.to_ascii_lowercase();
        let (host, port) = parse_authority(authority).ok_or_else(|| {
            format!("{origin:?} is more, or less, than scheme, host and port, such as https://chat.example.org:8443")
        })?;
        let port = port.or_else(|| default_port(&scheme));
        Ok(Self { scheme, host, port })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://", self.scheme)?;
        match &self.host {
            Host::Address(IpAddr::V6(address)) => write!(f, "[{address}]")?,
            Host::Address(address) => address.fmt(f)?,
            Host::Name(name) => f.write_str(name)?,
        }
        match self.port {
            Some(port) if self.port != default_port(&self.scheme) => write!(f, ":{port}"),
            _ => Ok(()),
        }
    }
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

/// Host and port; `None` if anything else is there.
fn parse_authority(authority: &str) -> Option<(Host, Option<u16>)> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']')?;
            (Host::Address(IpAddr::V6(address.parse().ok()?)), port)
        }
        None => {
            let end = authority.find(':').unwrap_or(authority.len());
            let (name, port) = authority.split_at(end);
            let is_name = |each: char| each.is_ascii_alphanumeric() || "-._~".contains(each);
            if name.is_empty() || !name.chars().all(is_name) {
                return None;
            }
            let host = match name.parse() {
                Ok(address) => Host::Address(address),
                Err(_) => Host::Name(name.to_ascii_lowercase()),
            };
            (host, port)
        }
    };
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => None,
        Some(digits) if digits.bytes().all(|digit| digit.is_ascii_digit()) => Some(digits.parse().ok()?),
        _ => return None,
    };
    Some((host, port))
}

/// One of those that an operator lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedOrigin {
    /// Every page of every site.
    Any,
    /// The pages of this origin.
    One(Origin),
}

impl FromStr for AllowedOrigin {
    type Err = String;

    fn from_str(origin: &str) -> Result<Self, String> {
        if origin == "*" { Ok(Self::Any) } else { origin.parse().map(Self::One) }
    }
}

impl fmt::Display for AllowedOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::One(origin) => origin.fmt(f),
        }
    }
}

/// Whose pages may connect besides those that are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Besides {
    /// Pages that this very server, by the name the browser knows it by, is the origin of.
    SameOrigin,
    /// Pages of this machine, from any port. The name that the browser knows the server by proves nothing: where nobody needs a password, a site
    /// whose name is made to lead to 127.0.0.1 would be of the same origin.
    Loopback,
}

/// Which web pages may connect.
#[derive(Clone, Debug)]
pub struct Origins {
    /// Those listed.
    pub listed: Vec<AllowedOrigin>,
    /// And these.
    pub besides: Besides,
}

impl Origins {
    /// Whether a page of this origin may connect to a server that it calls `host` (with a port if it is not the scheme's own) over this scheme.
    pub(crate) fn allow(&self, origin: &str, scheme: &str, host: Option<&str>) -> bool {
        if self.listed.contains(&AllowedOrigin::Any) {
            return true;
        }
        // `null` (a page in a sandbox, or from a file) is everybody's origin, and no origin here.
        let Ok(origin) = origin.parse::<Origin>() else { return false };
        if self.listed.iter().any(|listed| matches!(listed, AllowedOrigin::One(listed) if *listed == origin)) {
            return true;
        }
        match self.besides {
            Besides::Loopback => matches!(origin.scheme.as_str(), "http" | "https") && origin.host.is_loopback(),
            Besides::SameOrigin => {
                let server = host.and_then(|host| format!("{scheme}://{host}").parse::<Origin>().ok());
                server.is_some_and(|server| server == origin)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn origins(listed: &[&str], besides: Besides) -> Origins {
        Origins { listed: listed.iter().map(|origin| origin.parse().unwrap()).collect(), besides }
    }

    #[test]
    fn the_same_origin_is_scheme_host_and_port() {
        let origins = origins(&[], Besides::SameOrigin);
        for (origin, scheme, host) in [
            ("https://chat.example.org", "https", "chat.example.org"),
            ("https://chat.example.org", "https", "chat.example.org:443"),
            ("https://Chat.Example.ORG:443", "https", "chat.example.org"),
            ("http://chat.example.org", "http", "chat.example.org:80"),
            ("http://chat.example.org:8080", "http", "chat.example.org:8080"),
            ("http://127.0.0.1:8080", "http", "127.0.0.1:8080"),
            ("https://[2001:db8::1]:8443", "https", "[2001:0db8:0:0::1]:8443"),
        ] {
            assert!(origins.allow(origin, scheme, Some(host)), "{origin} {scheme} {host}");
        }
        for (origin, scheme, host) in [
            ("http://chat.example.org", "https", "chat.example.org"),
            ("https://chat.example.org", "http", "chat.example.org"),
            ("https://chat.example.org:8443", "https", "chat.example.org"),
            ("https://chat.example.org", "https", "chat.example.org:8443"),
            ("https://example.org", "https", "chat.example.org"),
            ("https://evil.chat.example.org", "https", "chat.example.org"),
            ("https://chat.example.org.evil", "https", "chat.example.org"),
            ("https://chat.example.org@evil", "https", "chat.example.org"),
            ("https://chat.example.org/", "https", "chat.example.org"),
            ("https://chat.example.org.", "https", "chat.example.org"),
            ("http://localhost:3000", "http", "localhost:8080"),
            ("http://[::1]:8080", "http", "127.0.0.1:8080"),
            ("null", "https", "null"),
            ("file://", "https", ""),
            ("", "https", ""),
        ] {
            assert!(!origins.allow(origin, scheme, Some(host)), "{origin} {scheme} {host}");
        }
        assert!(!origins.allow("https://chat.example.org", "https", None));
    }

    #[test]
    fn in_development_pages_are_of_this_machine_whatever_it_is_called() {
        let origins = origins(&[], Besides::Loopback);
        for origin in [
            "http://localhost:5173",
            "https://localhost",
            "http://app.localhost",
            "http://127.0.0.1:3000",
            "http://127.8.9.1",
            "http://[::1]:3000",
            "http://[::ffff:127.0.0.1]",
        ] {
            assert!(origins.allow(origin, "http", Some("localhost:8080")), "{origin}");
        }
        // A name that leads to 127.0.0.1 for a moment is still the name of its site.
        for (origin, host) in [
            ("http://evil.example.org:8080", "evil.example.org:8080"),
            ("http://localhost.evil.example.org", "localhost:8080"),
            ("http://127.0.0.1.evil.example.org", "localhost:8080"),
            ("http://notlocalhost", "localhost:8080"),
            ("capacitor://localhost", "localhost:8080"),
            ("null", "localhost:8080"),
            ("http://0.0.0.0", "localhost:8080"),
        ] {
            assert!(!origins.allow(origin, "http", Some(host)), "{origin}");
        }
    }

    #[test]
    fn those_listed_come_in_from_anywhere() {
        for besides in [Besides::SameOrigin, Besides::Loopback] {
            let origins = origins(&["https://app.example.org", "capacitor://localhost", "http://x:81"], besides);
            for origin in
                ["https://app.example.org", "https://APP.example.org:443", "capacitor://localhost", "http://x:81"]
            {
                assert!(origins.allow(origin, "http", Some("chat.example.org")), "{origin}");
            }
            for origin in
                ["http://app.example.org", "https://app.example.org:444", "http://x", "https://evil.example.org"]
            {
                assert!(!origins.allow(origin, "http", Some("chat.example.org")), "{origin}");
            }
        }
        let every = origins(&["*"], Besides::SameOrigin);
        assert!(every.allow("https://evil.example.org", "http", None) && every.allow("null", "http", None));
    }

    #[test]
    fn what_is_no_origin_is_not_listed() {
        for wrong in [
            "",
            "chat.example.org",
            "https://",
            "https://chat.example.org/",
            "https://chat.example.org/app",
            "https://me@chat.example.org",
            "https://chat.example.org:port",
            "https://chat.example.org:",
            "https://chat.example.org:70000",
            "https://*.example.org",
            "://chat.example.org",
            "null",
            "https://[::1",
            "https://a b",
        ] {
            assert!(wrong.parse::<AllowedOrigin>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn an_origin_is_written_as_it_is_read(scheme in "https?|app", host in "[a-z0-9.-]{1,12}|127\\.0\\.0\\.1|\\[::1\\]", port: Option<u16>) {
            let text = format!("{scheme}://{host}{}", port.map(|port| format!(":{port}")).unwrap_or_default());
            let origin: Origin = text.parse().unwrap();
            prop_assert_eq!(origin.to_string().parse::<Origin>().unwrap(), origin);
        }

        #[test]
        fn nothing_that_a_browser_could_send_panics(origin: String, host: String) {
            origins(&[], Besides::SameOrigin).allow(&origin, "https", Some(&host));
        }
    }
}

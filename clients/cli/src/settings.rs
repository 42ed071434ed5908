//! Where to connect, as whom and with what: from the settings file, the environment and the flags, the later stronger.
//!
//! Invariant: what a profile has to prove who one is goes to that profile's server, for that profile's user, and nowhere else. If another source names another
//! server or user, the profile's secrets stay where they are.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use chat_client::{FileOutbox, Options, Session, TokenError, UserId};
use etcetera::BaseStrategy as _;
use serde::Deserialize;

use crate::arguments::Flags;
use crate::failure::Failure;

const SERVER_DEFAULT: &str = "mqtt://127.0.0.1:1883";

/// The settings file.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    default_profile: Option<String>,
    #[serde(default)]
    profiles: BTreeMap<String, Profile>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    server: Option<String>,
    user: Option<String>,
    device: Option<String>,
    password: Option<String>,
    password_command: Option<String>,
    token_command: Option<String>,
    ca_file: Option<PathBuf>,
    client_certificate: Option<PathBuf>,
    client_key: Option<PathBuf>,
}

/// How this user proves who it is.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    None,
    Password(String),
    /// A shell command; the first line that it prints is the password.
    PasswordCommand(String),
    Token(String),
    /// A shell command; the first line that it prints is a token. Run before each connection.
    TokenCommand(String),
}

/// What all sources together say.
pub(crate) struct Settings {
    pub(crate) server: String,
    pub(crate) user: UserId,
    pub(crate) credential: Credential,
    /// What deserves to be said before anything is done.
    pub(crate) warnings: Vec<String>,
    device: Option<String>,
    timeout: Duration,
    ca_file: Option<PathBuf>,
    identity: Option<(PathBuf, PathBuf)>,
}

impl Settings {
    /// From this process's environment, the settings file and the flags.
    pub(crate) fn load(flags: &Flags) -> Result<Self, Failure> {
        let path = match &flags.config {
            Some(path) => Some(path.clone()),
            None => {
                etcetera::base_strategy::Xdg::new().ok().map(|folders| folders.config_dir().join("chat/config.toml"))
            }
        };
        let file = match &path {
            Some(path) => Source::read(path, flags.config.is_some())?,
            None => None,
        };
        Self::resolve(flags, |name| std::env::var_os(name), file)
    }

    fn resolve(
        flags: &Flags,
        environment: impl Fn(&str) -> Option<std::ffi::OsString>,
        source: Option<Source>,
    ) -> Result<Self, Failure> {
        let variable = |name: &str| match environment(name).filter(|value| !value.is_empty()) {
            Some(value) => match value.into_string() {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(Failure::usage(format!("{name} is not UTF-8"))),
            },
            None => Ok(None),
        };
        let mut warnings = Vec::new();
        let named = flags.profile.clone().map_or_else(|| variable("CHAT_PROFILE"), |name| Ok(Some(name)))?;
        let profile = match (&source, named) {
            (Some(source), named) => source.profile(named.as_deref())?,
            (None, Some(name)) => {
                return Err(Failure::usage(format!("there is no profile {name:?}, because there is no settings file")));
            }
            (None, None) => None,
        };
        let profile = profile.unwrap_or_default();
        if let Some(source) = &source
            && source.others_can_read
            && source.file.profiles.values().any(|profile| profile.password.is_some())
        {
            warnings
                .push(format!("others can read {0}, and a password is in it: chmod 600 {0}", source.path.display()));
        }

        let home = profile.server.clone().unwrap_or_else(|| SERVER_DEFAULT.to_owned());
        let server = flags.server.clone().map_or_else(|| variable("CHAT_SERVER"), |server| Ok(Some(server)))?;
        let server = server.unwrap_or_else(|| home.clone());
        let user = flags.user.clone().map_or_else(|| variable("CHAT_USER"), |user| Ok(Some(user)))?;
        let user = user.or_else(|| profile.user.clone()).ok_or_else(|| {
            Failure::usage(
                "who are you? Say it by --user NAME, CHAT_USER or a profile in the settings file (chat --help)",
            )
        })?;
        let device = flags.device.clone().map_or_else(|| variable("CHAT_DEVICE"), |device| Ok(Some(device)))?;

        let is_at_home = server == home && profile.user.as_ref().is_none_or(|own| *own == user);
        let credential = match (variable("CHAT_PASSWORD")?, variable("CHAT_TOKEN")?) {
            (Some(_), Some(_)) => {
                return Err(Failure::usage("CHAT_PASSWORD and CHAT_TOKEN are both set: which one is it?"));
            }
            (Some(password), None) => Credential::Password(password),
            (None, Some(token)) => Credential::Token(token),
            (None, None) if is_at_home => profile.credential()?,
            (None, None) => Credential::None,
        };
        let identity = match (&profile.client_certificate, &profile.client_key) {
            (Some(certificate), Some(key)) if is_at_home => Some((certificate.clone(), key.clone())),
            (Some(_), None) | (None, Some(_)) => {
                return Err(Failure::usage("client_certificate and client_key go together"));
            }
            _ => None,
        };
        if credential != Credential::None {
            warnings.extend(unencrypted(&server));
        }
        Ok(Self {
            user: UserId::parse(&user).map_err(|error| Failure::usage(format!("{user:?}: {error}")))?,
            device: device.or_else(|| profile.device.clone()),
            ca_file: profile.ca_file.clone().filter(|_| server == home),
            timeout: flags.timeout,
            server,
            credential,
            identity,
            warnings,
        })
    }

    /// For a program that is there once: no place of it is kept.
    pub(crate) fn temporary(&self) -> Result<Options, Failure> {
        // A device that was named is somebody else's, who keeps it.
        let device = format!("chat-{:016x}", fastrand::u64(..));
        Ok(self.options(&device)?.session(Session::Temporary))
    }

    /// What it was told to be called, or else the program and this machine.
    pub(crate) fn device(&self, program: &str) -> String {
        self.named_device().map_or_else(|| format!("{program}-{}", machine()), str::to_owned)
    }

    /// If it was told.
    pub(crate) fn named_device(&self) -> Option<&str> {
        self.device.as_deref()
    }

    /// For a device of this name.
    pub(crate) fn options(&self, device: &str) -> Result<Options, Failure> {
        let mut options = Options::new(&self.server, self.user.as_str(), device)?
            .request_timeout(self.timeout)
            .connect_timeout(self.timeout.min(Duration::from_secs(15)));
        if let Some(path) = &self.ca_file {
            options = options.roots(&read(path)?)?;
        }
        if let Some((certificate, key)) = &self.identity {
            options = options.client_certificate(&read(certificate)?, &read(key)?)?;
        }
        Ok(match &self.credential {
            Credential::None => options,
            Credential::Password(password) => options.password(password),
            Credential::PasswordCommand(command) => options.password(password_of(command)?),
            Credential::Token(token) => {
                let token = token.clone();
                options.token(move || std::future::ready(Ok(token.clone())))
            }
            Credential::TokenCommand(command) => {
                let command = command.clone();
                options.token(move || token_of(command.clone()))
            }
        })
    }

    /// How long to wait for the server.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Where messages of that device wait.
    pub(crate) fn outbox(&self, device: &str) -> Result<FileOutbox, Failure> {
        Ok(FileOutbox::open(self.state("outbox", device)?)?)
    }

    /// Where drafts of that device are kept.
    pub(crate) fn drafts(&self, device: &str) -> Result<PathBuf, Failure> {
        self.state("drafts", device)
    }

    /// What is kept on this machine: a file for each server, user and device.
    fn state(&self, what: &str, device: &str) -> Result<PathBuf, Failure> {
        let folders = etcetera::base_strategy::Xdg::new().map_err(|error| Failure::usage(error.to_string()))?;
        let state = folders.state_dir().unwrap_or_else(|| folders.data_dir()).join("chat").join(what);
        Ok(state.join(file_name(&self.server)).join(self.user.as_str()).join(file_name(device)))
    }
}

/// The settings file as it lies there.
struct Source {
    path: PathBuf,
    file: File,
    others_can_read: bool,
}

impl Source {
    /// `None` if it is not there and does not have to be.
    fn read(path: &Path, has_to_be: bool) -> Result<Option<Self>, Failure> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !has_to_be => return Ok(None),
            Err(error) => return Err(Failure::usage(format!("{}: {error}", path.display()))),
        };
        let others_can_read = std::fs::metadata(path).is_ok_and(|about| {
            use std::os::unix::fs::PermissionsExt as _;
            about.permissions().mode() & 0o077 != 0
        });
        Self::parse(path, &text, others_can_read).map(Some)
    }

    fn parse(path: &Path, text: &str, others_can_read: bool) -> Result<Self, Failure> {
        let mut file: File = toml::from_str(text).map_err(|error| {
            // The error's own form shows the line, which may hold a secret.
            let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            Failure::usage(format!("{}, line {line}: {}", path.display(), error.message()))
        })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for profile in file.profiles.values_mut() {
            for named in [&mut profile.ca_file, &mut profile.client_certificate, &mut profile.client_key] {
                *named = named.take().map(|path| folder.join(from_home(path)));
            }
        }
        Ok(Self { path: path.to_owned(), file, others_can_read })
    }

    /// The one of this name, or else the default one.
    fn profile(&self, name: Option<&str>) -> Result<Option<Profile>, Failure> {
        let Some(name) = name.or(self.file.default_profile.as_deref()) else { return Ok(None) };
        match self.file.profiles.get(name) {
            Some(profile) => Ok(Some(profile.clone())),
            None => {
                let known: Vec<&str> = self.file.profiles.keys().map(String::as_str).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                let path = self.path.display();
                Err(Failure::usage(format!("there is no profile {name:?} in {path}; there is {known}")))
            }
        }
    }
}

impl Profile {
    fn credential(&self) -> Result<Credential, Failure> {
        match (&self.password, &self.password_command, &self.token_command) {
            (None, None, None) => Ok(Credential::None),
            (Some(password), None, None) => Ok(Credential::Password(password.clone())),
            (None, Some(command), None) => Ok(Credential::PasswordCommand(command.clone())),
            (None, None, Some(command)) => Ok(Credential::TokenCommand(command.clone())),
            _ => Err(Failure::usage("password, password_command and token_command: a profile has one of them at most")),
        }
    }
}

/// `~/…` as a shell reads it.
fn from_home(path: PathBuf) -> PathBuf {
    match (path.strip_prefix("~"), etcetera::home_dir()) {
        (Ok(rest), Ok(home)) => home.join(rest),
        _ => path,
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
}

/// What deserves to be said before a login goes there.
pub(crate) fn unencrypted(server: &str) -> Option<String> {
    let warning = || format!("the login goes to {server} unencrypted; mqtts:// and wss:// are encrypted");
    is_readable_on_the_way(server).then(warning)
}

/// Whether others between here and there can read it.
fn is_readable_on_the_way(server: &str) -> bool {
    let Some(rest) = server.strip_prefix("mqtt://").or_else(|| server.strip_prefix("ws://")) else { return false };
    let authority = rest.split('/').next().unwrap_or_default();
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host != "localhost" && !host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// This machine, as far as its name can stand in a device's.
fn machine() -> String {
    let name = hostname::get().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let name: String = name.chars().filter(|c| !c.is_control()).take(48).collect();
    if name.is_empty() { "here".to_owned() } else { name }
}

/// As a file may be called: what is not harmless becomes its number.
fn file_name(text: &str) -> String {
    let mut name = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(char::from(byte)),
            b'.' if !name.is_empty() => name.push('.'),
            _ => name.push_str(&format!("%{byte:02X}")),
        }
    }
    name
}

/// What a password command says. It may ask on the terminal.
fn password_of(command: &str) -> Result<String, Failure> {
    let failed = |why: &str| Failure::usage(format!("password_command: {why}"));
    let output = std::process::Command::new("sh")
        .args(["-c", command])
        // What is piped to us is ours.
        .stdin(if std::io::stdin().is_terminal() { Stdio::inherit() } else { Stdio::null() })
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| failed(&error.to_string()))?;
    if !output.status.success() {
        return Err(failed(&format!("it ended with {}", output.status)));
    }
    first_line(&output.stdout).map_err(failed)
}

/// What a token command says. It is asked at any time: the terminal is not its own.
async fn token_of(command: String) -> Result<String, TokenError> {
    let output = tokio::process::Command::new("sh")
        .args(["-c", &command])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or_default();
        return Err(format!("token_command ended with {}: {said}", output.status).into());
    }
    Ok(first_line(&output.stdout).map_err(|why| format!("token_command: {why}"))?)
}

fn first_line(output: &[u8]) -> Result<String, &'static str> {
    let text = std::str::from_utf8(output).map_err(|_| "what it printed is not UTF-8")?;
    text.lines().next().filter(|line| !line.is_empty()).map(str::to_owned).ok_or("it printed nothing")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
default_profile = "home"

[profiles.home]
server = "mqtts://chat.example.org"
user = "alice"
password = "secret"
ca_file = "ca.pem"
device = "desk"

[profiles.work]
server = "wss://work.example.org/mqtt"
user = "alice"
token_command = "get-token"
client_certificate = "/etc/chat/alice.pem"
client_key = "/etc/chat/alice.key"

[profiles.bot]
user = "bob"
"#;

    fn flags() -> Flags {
        Flags { timeout: Duration::from_secs(30), ..Flags::default() }
    }

    fn load(flags: &Flags, environment: &[(&str, &str)], file: Option<&str>) -> Result<Settings, Failure> {
        let environment: BTreeMap<&str, &str> = environment.iter().copied().collect();
        let source = file.map(|text| Source::parse(Path::new("/home/alice/config.toml"), text, false)).transpose()?;
        Settings::resolve(flags, |name| environment.get(name).map(Into::into), source)
    }

    fn sentence(outcome: Result<Settings, Failure>) -> String {
        outcome.map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn the_later_source_wins() {
        let settings = load(&flags(), &[], Some(FILE)).unwrap();
        assert_eq!((settings.server.as_str(), settings.user.as_str()), ("mqtts://chat.example.org", "alice"));
        assert!(settings.credential == Credential::Password("secret".into()));
        assert_eq!(settings.ca_file.as_deref(), Some(Path::new("/home/alice/ca.pem")));
        assert_eq!(settings.device("chat"), "desk");

        let settings = load(&flags(), &[("CHAT_PROFILE", "work"), ("CHAT_DEVICE", "shelf")], Some(FILE)).unwrap();
        assert_eq!(settings.server, "wss://work.example.org/mqtt");
        assert!(settings.credential == Credential::TokenCommand("get-token".into()));
        assert!(settings.identity.is_some());
        assert_eq!(settings.device("chat"), "shelf");

        let flags = Flags { profile: Some("home".into()), device: Some("lamp".into()), ..flags() };
        let environment = [("CHAT_PROFILE", "work"), ("CHAT_DEVICE", "shelf"), ("CHAT_PASSWORD", "other")];
        let settings = load(&flags, &environment, Some(FILE)).unwrap();
        assert_eq!(settings.server, "mqtts://chat.example.org");
        assert!(settings.credential == Credential::Password("other".into()));
        assert_eq!(settings.device("chat"), "lamp");
    }

    #[test]
    fn without_a_file() {
        let settings = load(&flags(), &[("CHAT_USER", "bob"), ("CHAT_SERVER", "")], None).unwrap();
        assert_eq!((settings.server.as_str(), settings.user.as_str()), (SERVER_DEFAULT, "bob"));
        assert!(settings.device("chat").starts_with("chat-") && settings.named_device().is_none());
        assert!(sentence(load(&flags(), &[], None)).contains("--user"));
        assert!(sentence(load(&flags(), &[("CHAT_PROFILE", "home")], None)).contains("no settings file"));
    }

    #[test]
    fn secrets_stay_at_home() {
        for elsewhere in [
            Flags { server: Some("mqtts://other.example.org".into()), ..flags() },
            Flags { user: Some("bob".into()), ..flags() },
            Flags { server: Some("mqtt://127.0.0.1:1884".into()), profile: Some("work".into()), ..flags() },
        ] {
            let settings = load(&elsewhere, &[], Some(FILE)).unwrap();
            assert!(settings.credential == Credential::None && settings.identity.is_none(), "{elsewhere:?}");
        }
        let same = Flags { server: Some("mqtts://chat.example.org".into()), user: Some("alice".into()), ..flags() };
        assert!(load(&same, &[], Some(FILE)).unwrap().credential != Credential::None);
    }

    #[test]
    fn mistakes_are_named() {
        let unknown = sentence(load(&flags(), &[], Some("[profiles.home]\nuser = \"alice\"\npasword = \"secret\"\n")));
        assert!(unknown.contains("config.toml, line 3") && unknown.contains("`pasword`"), "{unknown}");
        assert!(!unknown.contains("secret"), "{unknown}");
        let outside = sentence(load(&flags(), &[], Some("server = \"mqtt://h\"\n")));
        assert!(outside.contains("`server`") && outside.contains("line 1"), "{outside}");
        let profile = sentence(load(&Flags { profile: Some("gone".into()), ..flags() }, &[], Some(FILE)));
        assert!(profile.contains("gone") && profile.contains("bot, home, work"), "{profile}");
        let both = "default_profile = \"a\"\n[profiles.a]\nuser = \"alice\"\npassword = \"a\"\ntoken_command = \"b\"\n";
        assert!(sentence(load(&flags(), &[], Some(both))).contains("one of them"));
        let half = "default_profile = \"a\"\n[profiles.a]\nuser = \"alice\"\nclient_key = \"a\"\n";
        assert!(sentence(load(&flags(), &[], Some(half))).contains("client_certificate"));
        let twice = [("CHAT_USER", "alice"), ("CHAT_PASSWORD", "a"), ("CHAT_TOKEN", "b")];
        assert!(sentence(load(&flags(), &twice, None)).contains("which one"));
        assert!(sentence(load(&flags(), &[("CHAT_USER", "Alice")], None)).contains("must match"));
    }

    #[test]
    fn passwords_that_others_can_read() {
        let warned = |text: &str, others_can_read: bool| {
            let source = Source::parse(Path::new("config.toml"), text, others_can_read).unwrap();
            let flags = Flags { user: Some("carol".into()), server: Some("mqtts://h".into()), ..flags() };
            Settings::resolve(&flags, |_| None, Some(source)).unwrap().warnings
        };
        assert!(warned(FILE, true)[0].contains("chmod 600 config.toml"));
        assert!(warned(FILE, false).is_empty());
        assert!(warned(&FILE.replace("password = \"secret\"", ""), true).is_empty());

        for (server, readable) in [
            ("mqtt://127.0.0.1:1883", false),
            ("mqtt://localhost", false),
            ("ws://[::1]:8080/mqtt", false),
            ("mqtts://chat.example.org", false),
            ("mqtt://chat.example.org", true),
            ("ws://192.0.2.1:80/mqtt", true),
            ("mqtt://localhost.example.org", true),
        ] {
            assert_eq!(is_readable_on_the_way(server), readable, "{server}");
        }
    }

    #[test]
    fn file_names_are_harmless_and_different() {
        assert_eq!(file_name("mqtt://h:1"), "mqtt%3A%2F%2Fh%3A1");
        assert_eq!(file_name(".."), "%2E.");
        assert_ne!(file_name("a%2F"), file_name("a/"));
    }

    #[test]
    fn commands_tell_secrets() {
        assert_eq!(password_of("printf 'first\\nsecond\\n'").unwrap(), "first");
        for (command, why) in [("exit 3", "exit status: 3"), ("true", "nothing"), ("printf '\\377\\n'", "UTF-8")] {
            let error = password_of(command).unwrap_err().to_string();
            // The command itself may hold a secret.
            assert!(error.starts_with("password_command: ") && error.contains(why), "{error}");
            assert!(command == "true" || !error.contains(command), "{error}");
        }
    }

    #[tokio::test]
    async fn commands_tell_tokens() {
        assert_eq!(token_of("echo token".into()).await.unwrap(), "token");
        let error = token_of("echo expired >&2; exit 1".into()).await.unwrap_err().to_string();
        assert!(error.contains("expired"), "{error}");
    }
}

//! MQTT over WebSocket: the route `/mqtt`, the handshake, and who may make it.
//!
//! MQTT packets need not align with WebSocket messages [MQTT-6.0.0-2], so a connection is a byte stream (`stream`) over the payload of `frames`.
//! What a page may do is decided by its `origin`, before anything is upgraded. No extension is ever agreed on: nothing is compressed.

mod frames;
mod origin;
mod stream;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hyper_util::rt::TokioIo;
use sha1::{Digest, Sha1};

pub use self::origin::{AllowedOrigin, Besides, Origin, Origins};
use self::stream::WebSocketStream;
use crate::broker::Broker;
use crate::service::{Peer, Service};

const SUBPROTOCOL: &str = "mqtt";
const WEBSOCKET_VERSION: &str = "13";
const KEY_BYTES: usize = 16;
/// What a server proves its understanding with [RFC 6455, 1.3].
const KEY_SUFFIX: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// How requests come in: an extension of theirs that the HTTP server sets, as [`Peer`] is. Without it they came in clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// In clear.
    Http,
    /// Over TLS.
    Https,
}

impl Scheme {
    fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// How the route treats clients.
#[derive(Clone, Debug)]
pub struct Options {
    /// Of an MQTT packet; a WebSocket message may be twice as long.
    pub packet_bytes_max: u32,
    /// Whose pages may connect.
    pub origins: Origins,
}

/// The route `/mqtt` for an HTTP server. Where a connection comes from are its request's extensions [`Peer`] and [`Scheme`].
pub fn router<S: Service>(broker: Broker<S>, options: Options) -> Router {
    let message_bytes_max = u64::from(options.packet_bytes_max).saturating_mul(2);
    let origins = options.origins;
    Router::new().route(
        "/mqtt",
        any(move |mut request: Request| {
            let answer = match accepted(&request, &origins) {
                Ok(answer) => answer,
                Err(refusal) => return std::future::ready(refusal.into_response()),
            };
            let peer = request.extensions_mut().remove::<Peer>().unwrap_or_default();
            let upgrade = hyper::upgrade::on(&mut request);
            let broker = broker.clone();
            // Ends with the HTTP connection, which has its own deadlines.
            drop(tokio::spawn(async move {
                match upgrade.await {
                    Ok(io) => {
                        let socket = WebSocketStream::new(TokioIo::new(io), message_bytes_max, peer.clone());
                        broker.serve(socket, peer);
                    }
                    Err(error) => tracing::debug!(%peer, %error, "websocket upgrade failed"),
                }
            }));
            std::future::ready(answer)
        }),
    )
}

/// Why a request is not upgraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Method,
    NoUpgrade,
    Version,
    Key,
    Body,
    Subprotocol,
    Origin,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, sentence) = match self {
            Self::Method => (StatusCode::METHOD_NOT_ALLOWED, "a WebSocket is opened with GET"),
            Self::NoUpgrade => {
                (StatusCode::UPGRADE_REQUIRED, "here is MQTT over WebSocket: ask for an upgrade, over HTTP/1.1")
            }
            Self::Version => (StatusCode::UPGRADE_REQUIRED, "the version of the WebSocket protocol is 13"),
            Self::Key => (StatusCode::BAD_REQUEST, "one sec-websocket-key of 16 bytes in base64 is needed"),
            Self::Body => (StatusCode::BAD_REQUEST, "a request for an upgrade has no body"),
            Self::Subprotocol => (StatusCode::BAD_REQUEST, "MQTT over WebSocket needs the subprotocol mqtt"),
            Self::Origin => {
                (StatusCode::FORBIDDEN, "pages of this origin may not connect: the operator lists it in http.origins")
            }
        };
        let named: &[(HeaderName, &str)] = match self {
            Self::Method => &[(header::ALLOW, "GET")],
            Self::NoUpgrade => &[(header::UPGRADE, "websocket"), (header::CONNECTION, "upgrade")],
            Self::Version => &[(header::SEC_WEBSOCKET_VERSION, WEBSOCKET_VERSION)],
            _ => &[],
        };
        let mut response = (status, format!("{sentence}\n")).into_response();
        for (name, value) in named {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

/// The answer to a handshake that is as it should be [RFC 6455, 4.2].
fn accepted(request: &Request, origins: &Origins) -> Result<Response, Refusal> {
    let headers = request.headers();
    if request.method() != Method::GET {
        return Err(Refusal::Method);
    }
    if request.version() != Version::HTTP_11
        || !lists(headers, &header::CONNECTION, |token| token.eq_ignore_ascii_case("upgrade"))
        || !lists(headers, &header::UPGRADE, |token| token.eq_ignore_ascii_case("websocket"))
    {
        return Err(Refusal::NoUpgrade);
    }
    if only(headers, &header::SEC_WEBSOCKET_VERSION) != Some(WEBSOCKET_VERSION) {
        return Err(Refusal::Version);
    }
    let key = only(headers, &header::SEC_WEBSOCKET_KEY).ok_or(Refusal::Key)?;
    if BASE64.decode(key).map_or(0, |key| key.len()) != KEY_BYTES {
        return Err(Refusal::Key);
    }
    // What stands behind the headers is frames, for us and for every proxy between.
    let has_body = headers.contains_key(header::TRANSFER_ENCODING)
        || headers.get_all(header::CONTENT_LENGTH).iter().any(|length| length != "0");
    if has_body {
        return Err(Refusal::Body);
    }
    if !lists(headers, &header::SEC_WEBSOCKET_PROTOCOL, |protocol| protocol == SUBPROTOCOL) {
        return Err(Refusal::Subprotocol);
    }
    if headers.contains_key(header::ORIGIN) {
        let scheme = request.extensions().get::<Scheme>().copied().unwrap_or(Scheme::Http);
        let host = only(headers, &header::HOST);
        let may = only(headers, &header::ORIGIN).is_some_and(|origin| origins.allow(origin, scheme.as_str(), host));
        if !may {
            return Err(Refusal::Origin);
        }
    }
    let answer = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static("websocket")),
        (header::SEC_WEBSOCKET_ACCEPT, accept_of(key)),
        (header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL)),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, answer).into_response())
}

/// The answer to a `sec-websocket-key`.
fn accept_of(key: &str) -> HeaderValue {
    let digest = Sha1::new().chain_update(key).chain_update(KEY_SUFFIX).finalize();
    HeaderValue::try_from(BASE64.encode(digest)).expect("base64 has only letters, digits, +, / and =")
}

/// The header, if it is there once, and text.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}

/// Whether one of the words, with commas between, is the one.
fn lists(headers: &HeaderMap, name: &HeaderName, is_it: impl Fn(&str) -> bool) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|word| is_it(word.trim()))
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    const GOOD: [(&str, &str); 6] = [
        ("host", "chat.example.org"),
        ("connection", "keep-alive, Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-protocol", "mqttv3.1, mqtt"),
    ];

    fn judge(method: Method, version: Version, headers: &[(&str, &str)], scheme: Scheme) -> Result<Response, Refusal> {
        let mut request = Request::builder().method(method).uri("/mqtt").version(version).extension(scheme);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let origins = Origins { listed: Vec::new(), besides: Besides::SameOrigin };
        accepted(&request.body(Body::empty()).unwrap(), &origins)
    }

    /// The good request, with this header otherwise; without it if there is no value.
    fn with(name: &str, values: &[&str]) -> Result<Response, Refusal> {
        let mut headers: Vec<_> = GOOD.into_iter().filter(|(other, _)| *other != name).collect();
        headers.extend(values.iter().map(|value| (name, *value)));
        judge(Method::GET, Version::HTTP_11, &headers, Scheme::Https)
    }

    #[test]
    fn a_good_handshake_is_answered() {
        let answer = judge(Method::GET, Version::HTTP_11, &GOOD, Scheme::Http).unwrap();
        assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
        // The example of RFC 6455, 1.3.
        assert_eq!(answer.headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(answer.headers()["sec-websocket-protocol"], "mqtt");
        let compressing = with("sec-websocket-extensions", &["permessage-deflate; client_max_window_bits"]).unwrap();
        assert!(!compressing.headers().contains_key("sec-websocket-extensions"), "no compression is agreed on");
    }

    #[test]
    fn anything_else_is_refused() {
        for (name, values, refusal) in [
            ("connection", &[][..], Refusal::NoUpgrade),
            ("connection", &["keep-alive"], Refusal::NoUpgrade),
            ("upgrade", &[], Refusal::NoUpgrade),
            ("upgrade", &["h2c"], Refusal::NoUpgrade),
            ("sec-websocket-version", &[], Refusal::Version),
            ("sec-websocket-version", &["8"], Refusal::Version),
            ("sec-websocket-version", &["13", "13"], Refusal::Version),
            ("sec-websocket-version", &["13, 8"], Refusal::Version),
            ("sec-websocket-key", &[], Refusal::Key),
            ("sec-websocket-key", &["c2hvcnQ="], Refusal::Key),
            ("sec-websocket-key", &["not base64 but so long=="], Refusal::Key),
            ("content-length", &["5"], Refusal::Body),
            ("transfer-encoding", &["chunked"], Refusal::Body),
            ("sec-websocket-protocol", &[], Refusal::Subprotocol),
            ("sec-websocket-protocol", &["chat"], Refusal::Subprotocol),
            ("sec-websocket-protocol", &["MQTT"], Refusal::Subprotocol),
            ("sec-websocket-protocol", &["mqttv3.1"], Refusal::Subprotocol),
            ("origin", &["https://evil.example.org"], Refusal::Origin),
            ("origin", &["http://chat.example.org"], Refusal::Origin),
            ("origin", &["null"], Refusal::Origin),
            ("origin", &["https://chat.example.org", "https://evil.example.org"], Refusal::Origin),
        ] {
            assert_eq!(with(name, values).err(), Some(refusal), "{name}: {values:?}");
        }
        assert!(with("origin", &["https://chat.example.org"]).is_ok());
        assert!(with("sec-websocket-protocol", &["chat", "mqtt"]).is_ok());
        for method in [Method::POST, Method::HEAD, Method::CONNECT] {
            assert_eq!(judge(method, Version::HTTP_11, &GOOD, Scheme::Http).err(), Some(Refusal::Method));
        }
        for version in [Version::HTTP_10, Version::HTTP_2] {
            assert_eq!(judge(Method::GET, version, &GOOD, Scheme::Http).err(), Some(Refusal::NoUpgrade));
        }
    }
}

//! The web chat as chatd serves it: what `npm run build` made of `clients/web`, built in and served at `/`.
//!
//! Whoever builds chatd without it gets a page there that says how to begin and how to build it. Files below `assets/` have their content in
//! their names and are kept by browsers for ever; the others are asked for again each time, and answered with 304 if they are the same. Every
//! file has its compressed form beside it, under a tag of its own. Invariant: nothing that is served here may run what is not served here too.

use std::borrow::Cow;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use broker::websocket::AllowedOrigin;
use rust_embed::Embed;

#[derive(Embed)]
#[folder = "../clients/web/dist/"]
#[allow_missing = true]
struct Files;

/// At `/` where there is no web chat.
const FIRST_PAGE: &str = include_str!("first_page.html");
/// Behind the name of a file that is the other, compressed.
const COMPRESSED: &str = ".gz";
/// Nothing from elsewhere, nothing written into a page.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; \
                      manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors ";
const EMBEDDED: &str = "embed.html";

/// One file, and how it is answered.
struct File {
    plain: Form,
    compressed: Option<Form>,
    headers: HeaderMap,
}

/// The bytes that are sent, and what these are called.
struct Form {
    body: Bytes,
    etag: HeaderValue,
}

/// Whether it was built in.
pub fn is_there() -> bool {
    Files::get("index.html").is_some()
}

/// `/` and the files of the web chat. Pages of `origins` may show `/embed.html` as a part of themselves.
pub fn router(origins: &[AllowedOrigin]) -> Router {
    let mut router = Router::new();
    if !is_there() {
        router = router.route("/", get(async || Html(FIRST_PAGE)));
    }
    for name in Files::iter().filter(|name| !name.ends_with(COMPRESSED)) {
        let Some(file) = read(&name, origins) else { continue };
        let file = Arc::new(file);
        let path = if name == "index.html" { "/".to_owned() } else { format!("/{name}") };
        router = router.route(&path, get(async move |asked: HeaderMap| file.answer(&asked)));
    }
    router
}

fn read(name: &str, origins: &[AllowedOrigin]) -> Option<File> {
    let embedded = Files::get(name)?;
    let hash: String = embedded.metadata.sha256_hash()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    let form = |data, suffix: &str| {
        Some(Form { body: bytes(data), etag: HeaderValue::from_str(&format!("\"{hash}{suffix}\"")).ok()? })
    };
    let compressed = Files::get(&format!("{name}{COMPRESSED}")).and_then(|file| form(file.data, "-gzip"));
    let is_hashed = name.starts_with("assets/");
    let kept = if is_hashed { "public, max-age=31536000, immutable" } else { "no-cache" };
    let mut headers = HeaderMap::new();
    let mut put = |name: HeaderName, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    };
    put(header::CONTENT_TYPE, content_type(name));
    put(header::CACHE_CONTROL, kept);
    put(header::VARY, "accept-encoding");
    put(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    put(header::REFERRER_POLICY, "no-referrer");
    put(header::CONTENT_SECURITY_POLICY, &format!("{POLICY}{}", ancestors(name, origins)));
    put(HeaderName::from_static("cross-origin-opener-policy"), "same-origin");
    put(HeaderName::from_static("permissions-policy"), "camera=(), geolocation=(), microphone=(), payment=(), usb=()");
    Some(File { plain: form(embedded.data, "")?, compressed, headers })
}

/// Of a program's own, nothing is copied.
fn bytes(embedded: Cow<'static, [u8]>) -> Bytes {
    match embedded {
        Cow::Borrowed(bytes) => Bytes::from_static(bytes),
        Cow::Owned(bytes) => bytes.into(),
    }
}

/// Whose pages may show this one as a part of themselves.
fn ancestors(name: &str, origins: &[AllowedOrigin]) -> String {
    if name != EMBEDDED {
        return "'none'".to_owned();
    }
    let others = origins.iter().map(AllowedOrigin::to_string);
    std::iter::once("'self'".to_owned()).chain(others).collect::<Vec<_>>().join(" ")
}

fn content_type(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        Some("png") => "image/png",
        Some("webmanifest") => "application/manifest+json",
        Some("woff2") => "font/woff2",
        Some("json") => "application/json",
        _ => "application/octet-stream",
    }
}

impl File {
    fn answer(&self, asked: &HeaderMap) -> Response {
        let mut headers = self.headers.clone();
        let compressed = self.compressed.as_ref().filter(|_| takes_gzip(asked));
        let Form { body, etag } = compressed.unwrap_or(&self.plain);
        headers.insert(header::ETAG, etag.clone());
        let is_known = |tags: &HeaderValue| tags.as_bytes().windows(etag.len()).any(|tag| tag == etag.as_bytes());
        if asked.get(header::IF_NONE_MATCH).is_some_and(is_known) {
            return (StatusCode::NOT_MODIFIED, headers).into_response();
        }
        if compressed.is_some() {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        (headers, body.clone()).into_response()
    }
}

/// Whether `Accept-Encoding` names gzip, and not to refuse it.
fn takes_gzip(asked: &HeaderMap) -> bool {
    let accepted = asked.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    accepted.flat_map(|value| value.split(',')).any(|coding| {
        let (coding, weight) = coding.split_once(';').unwrap_or((coding, ""));
        let weight = weight.trim().strip_prefix("q=").unwrap_or("1");
        coding.trim().eq_ignore_ascii_case("gzip") && weight.parse::<f32>().is_ok_and(|weight| weight > 0.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(name: HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    fn file() -> File {
        let form = |body, etag| Form { body: Bytes::from_static(body), etag: HeaderValue::from_static(etag) };
        File {
            plain: form(b"words", "\"1234\""),
            compressed: Some(form(b"wds", "\"1234-gzip\"")),
            headers: HeaderMap::new(),
        }
    }

    #[test]
    fn without_the_web_chat_there_is_a_page_that_says_how_to_begin() {
        assert!(FIRST_PAGE.contains("mosquitto_sub") && FIRST_PAGE.contains("scripts/run"));
    }

    #[test]
    fn a_compressed_file_is_for_who_takes_it() {
        let encoding = |asked: &'static str| {
            let answer = file().answer(&asking(header::ACCEPT_ENCODING, asked));
            answer.headers().get(header::CONTENT_ENCODING).cloned()
        };
        for asked in ["gzip", "gzip, deflate, br", "br;q=1.0, GZIP;q=0.5"] {
            assert_eq!(encoding(asked), Some(HeaderValue::from_static("gzip")), "{asked}");
        }
        for asked in ["", "br", "identity", "gzip;q=0", "x-gzip-like"] {
            assert_eq!(encoding(asked), None, "{asked}");
        }
        assert!(file().answer(&HeaderMap::new()).headers().get(header::CONTENT_ENCODING).is_none());
    }

    #[test]
    fn what_is_known_is_not_sent_again() {
        let status = |tags: &'static str| file().answer(&asking(header::IF_NONE_MATCH, tags)).status();
        for tags in ["\"1234\"", "W/\"1234\"", "\"1\", \"1234\""] {
            assert_eq!(status(tags), StatusCode::NOT_MODIFIED, "{tags}");
        }
        for tags in ["\"123\"", "1234", "", "\"1234-gzip\""] {
            assert_eq!(status(tags), StatusCode::OK, "{tags}");
        }
    }

    #[test]
    fn each_form_is_known_by_its_own_tag() {
        let answer = |encoding: &'static str, tags: &'static str| {
            let mut asked = asking(header::ACCEPT_ENCODING, encoding);
            asked.insert(header::IF_NONE_MATCH, HeaderValue::from_static(tags));
            let answer = file().answer(&asked);
            (answer.status(), answer.headers()[header::ETAG].clone())
        };
        for (encoding, tags, status, etag) in [
            ("gzip", "", StatusCode::OK, "\"1234-gzip\""),
            ("gzip", "\"1234-gzip\"", StatusCode::NOT_MODIFIED, "\"1234-gzip\""),
            ("gzip", "\"1234\"", StatusCode::OK, "\"1234-gzip\""),
            ("identity", "\"1234-gzip\"", StatusCode::OK, "\"1234\""),
            ("identity", "\"1234-gzip\", \"1234\"", StatusCode::NOT_MODIFIED, "\"1234\""),
        ] {
            assert_eq!(answer(encoding, tags), (status, HeaderValue::from_static(etag)), "{encoding}, {tags}");
        }
    }

    #[test]
    fn only_the_page_for_it_is_shown_inside_of_others() {
        let origins = ["https://shop.example.org".parse().expect("an origin")];
        assert_eq!(ancestors("index.html", &origins), "'none'");
        assert_eq!(ancestors(EMBEDDED, &origins), "'self' https://shop.example.org");
        assert_eq!(ancestors(EMBEDDED, &[]), "'self'");
        assert_eq!(ancestors(EMBEDDED, &[AllowedOrigin::Any]), "'self' *");
    }
}

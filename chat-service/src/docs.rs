//! The documentation as chatd serves it: the pages of `docs/` as HTML, the JSON Schemas as a reference, and both as files.
//!
//! Everything is built in and made once, when somebody asks first. The pages have no script; a link between pages of the repository leads to
//! the same page here, and one that leads elsewhere in the repository is left as text.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::LazyLock;

use axum::Router;
use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use pulldown_cmark::{CowStr, Event, Options, Parser, Tag, TagEnd, html};
use rust_embed::Embed;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Where the page is, its title, the file in `docs/`, and its text.
const PAGES: [(&str, &str, &str, &str); 13] = [
    ("/docs", "Protocol", "protocol.md", include_str!("../../docs/protocol.md")),
    ("/docs/mosquitto", "From a shell", "mosquitto.md", include_str!("../../docs/mosquitto.md")),
    ("/docs/terminal", "Chat in the terminal", "terminal.md", include_str!("../../docs/terminal.md")),
    ("/docs/chat", "chat, the command", "cli.md", include_str!("../../docs/cli.md")),
    ("/docs/rust", "Rust client", "sdk.md", include_str!("../../docs/sdk.md")),
    ("/docs/web-chat", "Web chat", "web.md", include_str!("../../docs/web.md")),
    ("/docs/web", "Web SDK", "web-sdk.md", include_str!("../../docs/web-sdk.md")),
    ("/docs/webhooks", "Webhooks", "webhooks.md", include_str!("../../docs/webhooks.md")),
    ("/docs/security", "Security", "security.md", include_str!("../../docs/security.md")),
    ("/docs/tls", "TLS and WebSocket", "tls.md", include_str!("../../docs/tls.md")),
    ("/docs/mqtt", "MQTT outside chat/", "mqtt.md", include_str!("../../docs/mqtt.md")),
    ("/docs/limits", "Limits", "limits.md", include_str!("../../docs/limits.md")),
    ("/docs/operations", "Operating", "operations.md", include_str!("../../docs/operations.md")),
];
const REFERENCE: &str = "/docs/reference";
const ASYNCAPI: &str = include_str!("../../docs/asyncapi.yaml");

const STYLE: &str = "
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
nav a { margin-right: 1rem }
pre { background: #8881; padding: 1rem; overflow-x: auto }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { border: 1px solid #8884; padding: .3rem .6rem; text-align: left; vertical-align: top }
@media (prefers-color-scheme: dark) { :root { color-scheme: dark } }
";

#[derive(Embed)]
#[folder = "../docs/schemas/"]
struct Schemas;

/// The schemas by file name.
fn schemas() -> BTreeMap<String, Value> {
    let parse = |name: Cow<'static, str>| {
        let file = Schemas::get(&name).expect("it was listed");
        (name.into_owned(), serde_json::from_slice(&file.data).expect("a test reads them all"))
    };
    Schemas::iter().map(parse).collect()
}

/// The pages by path.
static HTML: LazyLock<BTreeMap<&'static str, String>> = LazyLock::new(|| {
    let mut pages: BTreeMap<&'static str, String> =
        PAGES.into_iter().map(|(path, title, _, markdown)| (path, page(title, &to_html(markdown)))).collect();
    pages.insert(REFERENCE, page("Reference", &reference(&schemas())));
    pages
});

/// `/docs` and what is below it.
pub fn router() -> Router {
    let mut router = Router::new()
        .route("/docs/asyncapi.yaml", get(async || ([(header::CONTENT_TYPE, "application/yaml")], ASYNCAPI)))
        .route("/docs/schemas/{name}", get(async |Path(name): Path<String>| schema(&name)));
    for path in PAGES.map(|(path, ..)| path).into_iter().chain([REFERENCE]) {
        router = router.route(path, get(async move || show(path)));
    }
    router
}

fn show(path: &str) -> Response {
    static POLICY: LazyLock<String> = LazyLock::new(|| {
        let style = BASE64.encode(Sha256::digest(STYLE));
        format!("default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'")
    });
    let headers = [(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CONTENT_SECURITY_POLICY, &POLICY)];
    (headers, HTML[path].as_str()).into_response()
}

fn schema(name: &str) -> Response {
    match Schemas::get(name) {
        Some(file) => ([(header::CONTENT_TYPE, "application/schema+json")], file.data).into_response(),
        None => (StatusCode::NOT_FOUND, "there is no such schema; see /docs/reference\n").into_response(),
    }
}

fn page(title: &str, body: &str) -> String {
    let mut links = String::new();
    for (path, title, ..) in PAGES {
        links.push_str(&format!("<a href=\"{path}\">{title}</a> "));
    }
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{title} · MQTT Chat</title>\n<style>{STYLE}</style>\n\
         <nav>{links}<a href=\"{REFERENCE}\">Reference</a> <a href=\"/docs/asyncapi.yaml\">AsyncAPI</a></nav>\n\
         <main>\n{body}</main>\n</html>\n"
    )
}

fn to_html(markdown: &str) -> String {
    let mut events: Vec<Event<'_>> = Parser::new_ext(markdown, Options::ENABLE_TABLES).collect();
    let mut heading = None;
    let mut left_out = false;
    for at in 0..events.len() {
        match &mut events[at] {
            Event::Start(Tag::Heading { .. }) => heading = Some((at, String::new())),
            Event::Text(text) | Event::Code(text) => {
                if let Some((_, words)) = &mut heading {
                    words.push_str(text);
                }
            }
            Event::End(TagEnd::Heading(_)) => {
                if let Some((begin, words)) = heading.take()
                    && let Event::Start(Tag::Heading { id, .. }) = &mut events[begin]
                {
                    *id = Some(anchor(&words).into());
                }
            }
            Event::Start(Tag::Link { dest_url, .. }) => match destination(dest_url) {
                Some(here) => *dest_url = here,
                None => {
                    left_out = true;
                    events[at] = Event::Text("".into());
                }
            },
            Event::End(TagEnd::Link) if left_out => {
                left_out = false;
                events[at] = Event::Text("".into());
            }
            _ => {}
        }
    }
    let mut text = String::new();
    html::push_html(&mut text, events.into_iter());
    text
}

/// Where a link of a page in `docs/` leads here; `None` if nowhere.
fn destination(link: &str) -> Option<CowStr<'static>> {
    if link.starts_with('#') || link.starts_with("https://") {
        return Some(link.to_owned().into());
    }
    let (file, part) = link.split_once('#').map_or((link, String::new()), |(file, part)| (file, format!("#{part}")));
    let path = match file {
        "schemas" => REFERENCE,
        "asyncapi.yaml" => "/docs/asyncapi.yaml",
        _ => PAGES.into_iter().find(|(_, _, name, _)| *name == file)?.0,
    };
    Some(format!("{path}{part}").into())
}

/// A heading's anchor, as code hosts make it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The schemas as a page.
fn reference(schemas: &BTreeMap<String, Value>) -> String {
    let mut body = String::from(
        "<h1>Reference</h1>\n<p>What is sent and received, as JSON Schema (draft 7). What a client publishes is checked against the same; \
         to what the server publishes members may be added.</p>\n<ul>\n",
    );
    for (name, schema) in schemas {
        let title = schema["title"].as_str().unwrap_or(name);
        put(&mut body, format_args!("<li><a href=\"#{name}\">{}</a></li>\n", escaped(title)));
    }
    body.push_str("</ul>\n");
    for (name, schema) in schemas {
        let title = schema["title"].as_str().unwrap_or(name);
        put(&mut body, format_args!("<h2 id=\"{name}\">{}</h2>\n", escaped(title)));
        put(&mut body, format_args!("<p><a href=\"/docs/schemas/{name}\">{name}</a></p>\n"));
        if let Some(description) = schema["description"].as_str() {
            put(&mut body, format_args!("<p>{}</p>\n", escaped(description)));
        }
        let json = serde_json::to_string_pretty(schema).expect("it was JSON");
        put(&mut body, format_args!("{}<pre>{}</pre>\n", members(schema), linked(&json)));
    }
    body
}

/// A table of an object's members; empty if it has none of its own.
fn members(schema: &Value) -> String {
    let Some(properties) = schema["properties"].as_object() else { return String::new() };
    let required = |name: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|one| one == name));
    let mut table = String::from("<table><thead><tr><th>member</th><th></th><th>meaning</th></tr></thead><tbody>\n");
    for (name, member) in properties {
        let presence = if required(name) { "" } else { "may be missing" };
        let meaning = member["description"].as_str().unwrap_or_default();
        put(
            &mut table,
            format_args!(
                "<tr><td><code>{}</code></td><td>{presence}</td><td>{}</td></tr>\n",
                escaped(name),
                escaped(meaning)
            ),
        );
    }
    table.push_str("</tbody></table>\n");
    table
}

/// JSON with its references to other schemas as links.
fn linked(json: &str) -> String {
    let mut text = String::new();
    for line in json.split_inclusive('\n') {
        let target =
            line.split_once("\"$ref\": \"").and_then(|(_, rest)| rest.split_once('"')).map(|(target, _)| target);
        match target {
            Some(target) if !target.starts_with('#') => {
                let file = target.split('#').next().unwrap_or(target);
                let link = format!("<a href=\"#{file}\">{}</a>", escaped(target));
                text.push_str(&escaped(line).replacen(&escaped(target), &link, 1));
            }
            _ => text.push_str(&escaped(line)),
        }
    }
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn put(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("writing to a string does not fail");
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What follows `attribute="` in some HTML.
    fn attributes<'a>(html: &'a str, attribute: &'a str) -> impl Iterator<Item = &'a str> {
        html.split(attribute).skip(1).filter_map(|rest| rest.split('"').next())
    }

    #[test]
    fn every_link_leads_somewhere() {
        for (path, html) in HTML.iter() {
            for link in attributes(html, "href=\"") {
                if link.starts_with("https://") || link == "/docs/asyncapi.yaml" {
                    continue;
                }
                if let Some(name) = link.strip_prefix("/docs/schemas/") {
                    assert!(Schemas::get(name).is_some(), "{path} links to {link}");
                    continue;
                }
                let (page, part) = link.split_once('#').unwrap_or((link, ""));
                let target = if page.is_empty() { html } else { &HTML[page] };
                assert!(part.is_empty() || attributes(target, "id=\"").any(|id| id == part), "{path} links to {link}");
            }
            assert!(!html.contains("<script"), "{path}");
        }
    }

    #[test]
    fn pages_are_html() {
        let protocol = &HTML["/docs"];
        assert!(protocol.contains("<h2 id=\"the-message-envelope\">") && protocol.contains("<table>"));
        assert!(HTML[REFERENCE].contains("<h2 id=\"envelope.json\">"));
        assert_eq!(to_html("[a](decisions/x.md) [b](protocol.md#c)"), "<p>a <a href=\"/docs#c\">b</a></p>\n");
    }

    #[test]
    fn schemas_are_those_in_the_list() {
        let names: BTreeSet<String> = schemas().into_keys().collect();
        assert!(names.contains("envelope.json"));
        for (name, schema) in schemas() {
            assert_eq!(schema["$id"], name.as_str());
            assert!(schema["title"].is_string() && schema["description"].is_string(), "{name} says what it is");
        }
    }
}

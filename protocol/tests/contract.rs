//! The contract is written four times: here in code, in docs/protocol.md for people, in docs/asyncapi.yaml and docs/schemas for machines.
//! Whatever one of them has, all have.

use std::collections::BTreeSet;
use std::path::PathBuf;

use chat_protocol::request::Method;
use chat_protocol::topic::{Down, Observed, Up};
use chat_protocol::{ConversationId, ErrorCode, MessageId, UserId};
use serde_json::Value;

fn docs(path: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "docs", path].iter().collect()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(docs(path)).unwrap_or_else(|error| panic!("docs/{path}: {error}"))
}

fn schema(name: &str) -> Value {
    serde_json::from_str(&read(&format!("schemas/{name}"))).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn set<T: Into<String>>(all: impl IntoIterator<Item = T>) -> BTreeSet<String> {
    all.into_iter().map(Into::into).collect()
}

/// Code spans in the first cells of the rows of the tables below a heading.
fn first_cells(markdown: &str, heading: &str) -> BTreeSet<String> {
    let begin = format!("\n## {heading}\n");
    let (_, section) = markdown.split_once(&begin).unwrap_or_else(|| panic!("there is no heading {heading:?}"));
    let section = section.split("\n## ").next().unwrap_or(section);
    let cells = section.lines().filter(|line| line.starts_with('|')).filter_map(|row| row.split('|').nth(1));
    set(cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)))
}

fn down_topics() -> impl Iterator<Item = String> {
    Down::ALL.into_iter().map(|down| format!("chat/{{me}}/{}", down.suffix()))
}

/// Not a topic of [`Down`]: one of many.
const RESPONSE_TOPIC: &str = "chat/{me}/res/{token}";

#[test]
fn people_read_of_every_topic() {
    let protocol = read("protocol.md");
    assert_eq!(first_cells(&protocol, "What you publish"), set(Up::PATTERNS));
    let filters = Observed::FILTERS.into_iter().map(str::to_owned);
    let expected = set(down_topics().chain([RESPONSE_TOPIC.to_owned()]).chain(filters));
    assert_eq!(first_cells(&protocol, "What you subscribe to"), expected);
}

#[test]
fn machines_read_of_every_topic() {
    let asyncapi = read("asyncapi.yaml");
    let addresses = asyncapi.lines().filter_map(|line| line.trim().strip_prefix("address: "));
    let addresses = set(addresses.map(|address| address.trim_matches(['"', '\''])));
    let requests = Method::ALL.into_iter().map(|method| format!("chat/{{me}}/req/{}", method.as_str()));
    let others = Up::PATTERNS.into_iter().filter(|pattern| !pattern.ends_with("{method}")).map(str::to_owned);
    let down = down_topics().chain([RESPONSE_TOPIC.to_owned()]);
    assert_eq!(addresses, set(requests.chain(others).chain(down)));
}

#[test]
fn every_method_is_told() {
    let methods = set(Method::ALL.map(Method::as_str));
    assert_eq!(first_cells(&read("protocol.md"), "Requests"), methods);
    for kind in ["request", "response"] {
        assert_eq!(schemas(kind), methods, "{kind}s");
    }
}

#[test]
fn every_code_is_told_with_its_reason_code() {
    let protocol = read("protocol.md");
    let codes = set(ErrorCode::ALL.map(ErrorCode::as_str));
    assert_eq!(first_cells(&protocol, "Error codes"), codes);
    for code in ErrorCode::ALL {
        let row = format!("| `{}` | 0x{:02X} |", code.as_str(), code.reason_code());
        assert!(protocol.contains(&row), "{row} is not in docs/protocol.md");
    }
    let listed = schema("error-code.json");
    let listed = listed["enum"].as_array().expect("a list of codes");
    assert_eq!(set(listed.iter().map(|code| code.as_str().expect("text"))), codes);
}

#[test]
fn every_event_has_a_schema() {
    let events = Down::ALL.into_iter().filter_map(|down| down.suffix().strip_prefix("event/"));
    assert_eq!(schemas("event"), set(events));
}

#[test]
fn names_have_one_grammar() {
    let names = schema("names.json");
    for (name, grammar) in
        [("user", UserId::GRAMMAR), ("id", MessageId::GRAMMAR), ("conversation", ConversationId::GRAMMAR)]
    {
        let pattern = names["definitions"][name]["pattern"].as_str().expect("a pattern");
        assert_eq!(pattern, format!("^{grammar}$"), "{name}");
    }
}

/// What follows `{kind}-` in the names of schemas.
fn schemas(kind: &str) -> BTreeSet<String> {
    let files = std::fs::read_dir(docs("schemas")).expect("docs/schemas");
    let names = files.map(|file| file.expect("a file").file_name().into_string().expect("a name"));
    let prefix = format!("{kind}-");
    set(names.filter_map(|name| Some(name.strip_prefix(&prefix)?.strip_suffix(".json")?.to_owned())))
}

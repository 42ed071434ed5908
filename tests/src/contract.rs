//! Whatever a server publishes below `chat/` is what docs/schemas say, to the member: what they do not name does not come.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use anyhow::{Context, Result, ensure};
use jsonschema::{Draft, Registry, Validator};
use serde_json::Value;

struct Contract {
    validators: BTreeMap<String, Validator>,
}

static CONTRACT: LazyLock<Contract> = LazyLock::new(|| Contract::read().expect("docs/schemas"));

impl Contract {
    fn read() -> Result<Self> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/schemas");
        let mut open = BTreeMap::new();
        for file in std::fs::read_dir(folder)? {
            let path = file?.path();
            let name = path.file_name().and_then(|name| name.to_str()).context("a name")?.to_owned();
            let schema: Value = serde_json::from_slice(&std::fs::read(&path)?).context(name.clone())?;
            open.insert(name, schema);
        }
        let mut schemas = open.clone();
        for (name, schema) in &mut schemas {
            forbid_others(schema, &open);
            // A base for the references between them, which are file names.
            schema["$id"] = uri(name).into();
        }
        let mut registry = Registry::new().draft(Draft::Draft7);
        for (name, schema) in &schemas {
            registry = registry.add(uri(name), schema.clone())?;
        }
        let registry = registry.prepare()?;
        let mut validators = BTreeMap::new();
        for (name, schema) in schemas {
            let validator = jsonschema::options().with_draft(Draft::Draft7).with_registry(&registry).build(&schema);
            validators.insert(name.clone(), validator.with_context(|| name)?);
        }
        Ok(Self { validators })
    }
}

fn uri(name: &str) -> String {
    format!("schema:///{name}")
}

/// Schemas are open, for members to come; this server has exactly the members that they name.
fn forbid_others(schema: &mut Value, all: &BTreeMap<String, Value>) {
    match schema {
        Value::Object(members) => {
            if members.get("type").is_some_and(|kind| kind == "object") && members.contains_key("properties") {
                take_in_parts(members, all);
                members.insert("additionalProperties".to_owned(), false.into());
            }
            // What is in `allOf` names a part of the members only, unless it is another file.
            members.iter_mut().filter(|(name, _)| *name != "allOf").for_each(|(_, part)| forbid_others(part, all));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| forbid_others(item, all)),
        _ => {}
    }
}

/// The members of another file that an object has besides its own.
fn take_in_parts(members: &mut serde_json::Map<String, Value>, all: &BTreeMap<String, Value>) {
    let Some(Value::Array(parts)) = members.get_mut("allOf") else { return };
    let mut taken = Vec::new();
    parts.retain(|part| match part["$ref"].as_str().and_then(|file| all.get(file)) {
        Some(other) => {
            taken.push(other);
            false
        }
        None => true,
    });
    if parts.is_empty() {
        members.remove("allOf");
    }
    for other in taken {
        for (name, member) in other["properties"].as_object().into_iter().flatten() {
            members["properties"][name] = member.clone();
        }
        let required = members.entry("required").or_insert_with(|| Value::Array(Vec::new()));
        let more = other["required"].as_array().cloned().unwrap_or_default();
        required.as_array_mut().expect("a list of names").extend(more);
    }
}

/// Whether a document is what a schema says, by the schema's file name without `.json`.
///
/// # Errors
/// What is wrong with it.
pub fn check(schema: &str, document: &Value) -> Result<()> {
    let validator = CONTRACT.validators.get(&format!("{schema}.json")).with_context(|| format!("no {schema}.json"))?;
    let wrong: Vec<String> =
        validator.iter_errors(document).map(|error| format!("{}: {error}", error.instance_path())).collect();
    ensure!(wrong.is_empty(), "not what {schema}.json says: {}\n{document}", wrong.join("; "));
    Ok(())
}

/// Whether a message that the server published is what its topic promises. Topics outside `chat/` promise nothing.
///
/// # Errors
/// What is wrong with it.
pub fn check_published(topic: &str, payload: &[u8]) -> Result<()> {
    let Some((_user, suffix)) = topic.strip_prefix("chat/").and_then(|rest| rest.split_once('/')) else {
        return Ok(());
    };
    let document = serde_json::from_slice(payload).with_context(|| format!("{topic}: no JSON"))?;
    match suffix {
        "inbox" | "sent" => check("envelope", &document),
        _ if suffix == "res" || suffix.starts_with("res/") => {
            let mut answers = CONTRACT.validators.iter().filter(|(name, _)| name.starts_with("response-"));
            ensure!(answers.any(|(_, answer)| answer.is_valid(&document)), "the answer to no request: {document}");
            Ok(())
        }
        _ => {
            let event = suffix.strip_prefix("event/").with_context(|| format!("{topic}: no such topic"))?;
            check(&format!("event-{event}"), &document)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_wrong_is_found() {
        let right = json!({"with": "bob", "delivered": 2, "read": 1});
        check("event-receipt", &right).expect("right");
        for (member, wrong) in
            [("with", json!("Bob")), ("read", json!(-1)), ("delivered", json!("2")), ("new", json!(1))]
        {
            let mut document = right.clone();
            document[member] = wrong;
            assert!(check("event-receipt", &document).is_err(), "{document}");
        }
        assert!(check("event-receipt", &json!({"with": "bob"})).is_err());
        assert!(check_published("chat/bob/inbox", br#"{"v":1}"#).is_err());
        assert!(check_published("chat/bob/event/other", br#"{}"#).is_err());
        assert!(check_published("chat/bob/res", br#"{"ref":1}"#).is_err());
        check_published("chat/bob/res", br#"{"ref":1,"ok":{}}"#).expect("an answer to block");
        check_published("home/lamp", b"on").expect("nothing is promised");
    }
}

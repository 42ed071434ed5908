//! The contract as a machine reads it. That the server keeps to it is checked at every message that the tests receive.

use end_to_end::{Chatd, Connect, contract, programs};
use serde_json::json;

/// The official AsyncAPI parser and a JSON Schema validator of their own find nothing wrong with the documents.
#[tokio::test]
async fn the_documents_are_valid() {
    let printed = programs::node("contract.mjs", &[]).await.unwrap();
    assert!(printed.contains("contract: "), "{printed}");
}

#[tokio::test]
async fn the_server_has_the_documentation_with_it() {
    let chatd = Chatd::start().await.unwrap();
    for (path, part) in [
        ("/docs", "<h2 id=\"the-message-envelope\">"),
        ("/docs/reference", "<h2 id=\"envelope.json\">"),
        ("/docs/webhooks", "webhook-signature"),
        ("/docs/mosquitto", "mosquitto_sub"),
        ("/docs/operations", "chatd_connections"),
        ("/docs/asyncapi.yaml", "asyncapi: 3.0.0"),
        ("/docs/schemas/error-code.json", "storage_full"),
    ] {
        let (status, body) = chatd.get(path).await.unwrap();
        assert_eq!(status, 200, "{path}");
        assert!(body.contains(part), "{path} has no {part}");
    }
    let (status, _) = chatd.get("/docs/schemas/..%2Fprotocol.md").await.unwrap();
    assert_eq!(status, 404);
}

/// Requests and answers of every method, besides those that the tests of a messenger make.
#[tokio::test]
async fn every_method_keeps_to_its_schemas() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.subscribe("chat/alice/res", 1).await.unwrap();
    let mut bob = Connect::v5("bob", "phone").to(&chatd).await.unwrap();
    for text in ["one", "two", "three", "four"] {
        alice.say("alice", "bob", text).await.unwrap();
        bob.say("bob", "alice", text).await.unwrap();
    }
    for (method, request) in [
        ("whoami", json!({})),
        ("edit", json!({"with": "bob", "seq": 1, "text": "uno", "id": "e-1"})),
        ("unsend", json!({"with": "bob", "seq": 3})),
        ("delete", json!({"with": "bob", "seq": 5})),
        ("block", json!({"with": "bob"})),
        ("blocked", json!({})),
        ("conversations", json!({"limit": 1})),
        ("history", json!({"with": "bob", "limit": 3, "before": 9})),
        ("history", json!({"with": "bob", "after": 1, "raw": true})),
        ("sync", json!({"limit": 2})),
        ("unblock", json!({"with": "bob"})),
    ] {
        contract::check(&format!("request-{method}"), &request).unwrap();
        let topic = format!("chat/alice/req/{method}");
        alice.publish(end_to_end::packet::Publish::new(topic, request.to_string(), 1)).await.unwrap();
        let answer = alice.acked_message_on("chat/alice/res").await.unwrap().json();
        assert!(answer["ok"].is_object(), "{method}: {answer}");
        contract::check(&format!("response-{method}"), &answer).unwrap();
    }
}

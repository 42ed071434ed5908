// The machine-readable contract: docs/asyncapi.yaml is valid AsyncAPI, docs/schemas are valid JSON Schemas, and they take the samples of
// protocol/fixtures and refuse what they should. Prints what is wrong, or a summary.
// node contract.mjs
import { readdir, readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";

import { DiagnosticSeverity, Parser } from "@asyncapi/parser";
import { Ajv } from "ajv";

const docs = new URL("../../docs/", import.meta.url);
const schemas = new URL("schemas/", docs);
const fixtures = new URL("../../protocol/fixtures/", import.meta.url);

/** Which schema each fixture is a sample of. */
const FIXTURES = {
  "edit.json": "envelope.json",
  "erased.json": "envelope.json",
  "error.json": "event-error.json",
  "presence.json": "event-presence.json",
  "read.json": "event-read.json",
  "receipt.json": "event-receipt.json",
  "text-without-id.json": "envelope.json",
  "text.json": "envelope.json",
  "typing.json": "event-typing.json",
  // Clients ignore an entry of a kind that they do not know; the schema has the kinds of this version only.
  "unknown-kind.json": null,
  "unknown-member.json": "envelope.json",
  "unsend.json": "envelope.json",
};

const text = JSON.parse(await readFile(new URL("text.json", fixtures), "utf8"));
const { text: _words, ...wordless } = text;
const standing = { with: "bob", delivered: 17, read: 12, my_read: 17, blocked: false };

/** Samples besides the fixtures that a schema takes. */
const TAKEN = [
  ["event-error.json", { code: "invalid_topic", message: "no such topic", topic: "chat/alice", id: null }],
  ["event-presence.json", { user: "bob", status: "online" }],
  ["request-whoami.json", {}],
  ["request-conversations.json", { ref: "r-1", limit: 200, before: "1795456800123.bob" }],
  ["request-history.json", { with: "bob", after: 0, limit: 1, raw: true }],
  ["request-history.json", { ref: null, with: "bob", before: 5, after: null, limit: null }],
  ["request-sync.json", { since: "1.5f3a9c.0.ff" }],
  ["request-block.json", { with: "bob" }],
  ["request-unblock.json", { ref: 1.5, with: "bob" }],
  ["request-blocked.json", { ref: 1 }],
  ["request-delete.json", { with: "bob", seq: 17 }],
  ["request-unsend.json", { with: "bob", seq: 17, id: "m-003" }],
  ["request-edit.json", { with: "bob", seq: 17, text: "hello!" }],
  ["response-whoami.json", { ok: { user: "alice", at: 1795456800123, version: "0.1.0", message_bytes: 16384 } }],
  ["response-conversations.json", { ref: 1, ok: { conversations: [{ ...standing, last: text, unread: 1 }], next: "17.bob" } }],
  ["response-history.json", { ref: "r-1", ok: { with: "bob", entries: [text, { ...wordless, unsent: true }], more: true } }],
  ["response-history.json", { ok: { with: "bob", entries: [{ ...wordless, kind: "erased" }], more: false } }],
  ["response-history.json", { error: { code: "unknown_conversation", message: "you have no conversation with bob" } }],
  ["response-sync.json", { ok: { entries: [text], conversations: [{ ...standing, deleted: [3] }], next: "1.2.3.4", more: false } }],
  ["response-block.json", { ref: 1, ok: {} }],
  ["response-unblock.json", { ok: {} }],
  ["response-blocked.json", { ok: { blocked: [{ user: "bob", at: 1795456800123 }] } }],
  ["response-delete.json", { ok: {} }],
  ["response-unsend.json", { ok: { seq: 19, at: 1795456890001 } }],
  ["response-edit.json", { ok: { seq: 18, at: 1795456860001 } }],
  ["webhook-message.stored.json", { type: "message.stored", data: text }],
  ["webhook-message.waiting.json", { type: "message.waiting", data: text }],
  ["webhook-presence.json", { type: "presence", data: { user: "bob", status: "offline", last_seen: 1795456800123 } }],
  ["webhook-presence.reset.json", { type: "presence.reset", data: { at: 1795456800123 } }],
];

/** Samples that a schema refuses. */
const REFUSED = [
  ["envelope.json", { ...text, from: "Alice" }],
  ["envelope.json", { ...text, from: "a".repeat(65) }],
  ["envelope.json", { ...text, conversation: "alice" }],
  ["envelope.json", { ...text, seq: 0 }],
  ["envelope.json", { ...text, id: "a b" }],
  ["envelope.json", { ...text, v: 2 }],
  ["envelope.json", { ...text, kind: "reaction" }],
  ["envelope.json", { ...text, kind: "edit" }],
  ["envelope.json", { ...text, kind: "erased" }],
  ["envelope.json", wordless],
  ["event-error.json", { code: "invalid_topic", message: "no such topic", topic: "chat/alice" }],
  ["event-error.json", { code: "nonsense", message: "", topic: "chat/alice", id: null }],
  ["event-receipt.json", { with: "bob", delivered: -1, read: 0 }],
  ["event-read.json", { with: "bob" }],
  ["event-typing.json", { from: "bob", state: true }],
  ["event-presence.json", { user: "bob", status: "away" }],
  ["request-whoami.json", { with: "bob" }],
  ["request-whoami.json", { ref: [] }],
  ["request-conversations.json", { before: "bob" }],
  ["request-history.json", {}],
  ["request-history.json", { with: "bob", limit: 0 }],
  ["request-history.json", { with: "bob", limit: 201 }],
  ["request-history.json", { with: "bob", before: 0 }],
  ["request-history.json", { with: "bob", before: 1, after: 1 }],
  ["request-delete.json", { with: "bob", seq: 0 }],
  ["request-edit.json", { with: "bob", seq: 1 }],
  ["request-edit.json", { with: "bob", seq: 1, text: "" }],
  ["request-unsend.json", { with: "bob", seq: 1, id: "a b" }],
  ["response-block.json", {}],
  ["response-block.json", { ok: {}, error: { code: "unavailable", message: "ask again" } }],
  ["response-history.json", { ok: { with: "bob", entries: [{ ...text, unsent: true }, wordless], more: false } }],
  ["response-sync.json", { ok: { entries: [], conversations: [{ with: "bob" }], next: "1.2.3.4", more: false } }],
  ["webhook-message.waiting.json", { type: "message.waiting", data: { ...wordless, kind: "erased" } }],
  ["webhook-message.waiting.json", { type: "message.stored", data: text }],
];

const wrong = [];
const check = (is, sentence) => {
  if (!is) wrong.push(sentence);
};

// ---- the schemas and their samples

// A `required` in a branch of `oneOf` or `then` is of members that stand outside it, which `strictRequired` does not see.
const ajv = new Ajv({ strict: true, strictRequired: false, allowUnionTypes: true, allErrors: true });
const names = (await readdir(schemas)).filter((name) => name.endsWith(".json")).sort();
for (const name of names) {
  const schema = JSON.parse(await readFile(new URL(name, schemas), "utf8"));
  check(schema.$id === name, `${name}: $id is ${schema.$id}`);
  check(schema.title && schema.description, `${name}: it has no title or no description`);
  try {
    ajv.addSchema(schema);
  } catch (error) {
    wrong.push(`${name}: ${error.message}`);
  }
}
if (wrong.length) fail();
for (const name of names) {
  try {
    ajv.getSchema(name);
  } catch (error) {
    wrong.push(`${name}: ${error.message}`);
  }
}
if (wrong.length) fail();

let samples = 0;
const validate = (name, sample, expected, what, validator = ajv.getSchema(name)) => {
  samples += 1;
  if (!validator) return wrong.push(`${what}: there is no schema ${name}`);
  const valid = validator(sample);
  const why = valid ? "it is taken" : ajv.errorsText(validator.errors, { dataVar: "" });
  check(valid === expected, `${what}: ${name} should ${expected ? "take" : "refuse"} it: ${why}`);
};
const found = (await readdir(fixtures)).filter((name) => name.endsWith(".json"));
for (const name of found) {
  const schema = FIXTURES[name];
  if (schema === undefined) {
    wrong.push(`${name}: it is not said which schema this fixture is a sample of`);
    continue;
  }
  const sample = JSON.parse(await readFile(new URL(name, fixtures), "utf8"));
  validate(schema ?? "envelope.json", sample, schema !== null, name);
}
for (const [name, sample] of TAKEN) validate(name, sample, true, JSON.stringify(sample));
for (const [name, sample] of REFUSED) validate(name, sample, false, JSON.stringify(sample));

// ---- the document

const source = fileURLToPath(new URL("asyncapi.yaml", docs));
const yaml = await readFile(source, "utf8");
const { document, diagnostics } = await new Parser().parse(yaml, { source });
for (const { code, message, path, range, severity } of diagnostics) {
  const level = DiagnosticSeverity[severity].toLowerCase();
  const line = `asyncapi.yaml:${range.start.line + 1}: ${level} ${code}: ${message} (${path.join(".")})`;
  if (severity > DiagnosticSeverity.Warning) console.log(line);
  else wrong.push(line);
}
check(document, "asyncapi.yaml: it is no AsyncAPI document");
const channels = document?.channels().all() ?? [];

// The parser does not hold examples to their schemas. It adds members of its own to those that are in the document itself.
const loose = new Ajv({ strict: false });
for (const message of document?.components().messages() ?? []) {
  const payload = message.payload().json();
  for (const example of message.examples()) {
    const validator = ajv.getSchema(payload.$id ?? "") ?? loose.compile(payload);
    validate(payload.$id ?? "its schema", example.payload(), true, `the example of ${message.id()}`, validator);
  }
}

// Every schema of a payload is used: what the document leaves out would be forgotten in it.
for (const name of names.filter((name) => /^(envelope|event-|request-|response-)/.test(name))) {
  check(yaml.includes(`$ref: ./schemas/${name}\n`), `asyncapi.yaml: it has no message of ${name}`);
}

if (wrong.length) fail();
console.log(`contract: ${channels.length} channels, ${names.length} schemas, ${samples} samples`);

function fail() {
  for (const sentence of wrong) console.error(sentence);
  process.exit(1);
}

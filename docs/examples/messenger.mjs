// A messenger in 60 lines: node messenger.mjs alice [url], with mqtt.js (npm install mqtt). Lines on stdin are commands:
// /list, /history PEER, /typing PEER, /read PEER SEQ, /quit; anything else is PEER and a text, e.g. "bob hello there".
import { randomUUID } from "node:crypto";
import { createInterface } from "node:readline";
import mqtt from "mqtt";

const [me, url = "ws://127.0.0.1:8080/mqtt"] = process.argv.slice(2);
const say = (...words) => console.log(...words);
const client = mqtt.connect(url, {
  username: me, clientId: `${me}-js`, protocolVersion: 5, clean: false, properties: { sessionExpiryInterval: 0xffffffff },
});
const ask = (method, members = {}) =>
  client.publish(`chat/${me}/req/${method}`, JSON.stringify(members), {
    qos: 1, properties: { responseTopic: `chat/${me}/res/js`, correlationData: Buffer.from(method) },
  });

client.on("connect", () => {
  const topics = ["inbox", "sent", "event/+", "res/js"].map((topic) => `chat/${me}/${topic}`);
  client.subscribe(topics, { qos: 1 }, () => {
    say("connected");
    ask("conversations");
  });
});
client.on("error", (error) => say("refused:", error.message));

client.on("message", (topic, payload, packet) => {
  const [kind, body] = [topic.slice(`chat/${me}/`.length), JSON.parse(payload.toString())];
  if (kind === "inbox" && body.kind === "text") {
    say(`${body.from} #${body.seq}${packet.retain ? " (waited)" : ""}: ${body.text}`);
  } else if (kind === "event/receipt") {
    say(`✓✓ ${body.with}: delivered up to #${body.delivered}, read up to #${body.read}`);
  } else if (kind === "event/typing") {
    say(`${body.from} ${body.state === "on" ? "is typing" : "stopped typing"}`);
  } else if (kind === "event/presence") {
    say(`${body.user} is ${body.status}`);
  } else if (kind === "event/error" || body.error) {
    say("refused:", (body.error ?? body).message);
  } else if (body.ok?.conversations) {
    for (const one of body.ok.conversations)
      say(`conversation with ${one.with}: ${one.unread} unread, last: ${one.last?.text}`);
  } else if (body.ok?.entries) {
    for (const entry of body.ok.entries) say(`history #${entry.seq} ${entry.from}: ${entry.text ?? "(unsent)"}`);
  }
});

for await (const line of createInterface({ input: process.stdin })) {
  const [command, ...words] = line.trim().split(" ");
  if (command === "/quit") break;
  else if (command === "/list") ask("conversations");
  else if (command === "/history") ask("history", { with: words[0] });
  else if (command === "/typing") client.publish(`chat/${me}/typing/${words[0]}`, "on");
  else if (command === "/read") client.publish(`chat/${me}/read/${words[0]}`, words[1], { qos: 1 });
  else if (words.length) {
    const text = words.join(" ");
    client.publish(`chat/${me}/out/${command}/${randomUUID()}`, text, { qos: 1 }, (error, packet) =>
      say(error ? `refused: ${error.message}` : `✓ stored: ${text}`));
  }
}
client.end();
process.stdin.destroy();

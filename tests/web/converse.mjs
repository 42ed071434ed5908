// One conversation with mqtt.js, the same in Node and in a browser.

/**
 * Bob subscribes, alice sends two messages at QoS 1 and one at QoS 2, and bob's messages are returned when all three are there.
 * @param mqtt the module
 * @param {string} url of the WebSocket
 * @param {4 | 5} protocolVersion 4 is MQTT 3.1.1
 */
export async function converse(mqtt, url, protocolVersion) {
  const connect = (username) =>
    mqtt.connectAsync(url, { username, clientId: `${username}-js-${protocolVersion}`, protocolVersion, reconnectPeriod: 0 });
  const bob = await connect("bob");
  const alice = await connect("alice");
  const seen = [];
  const complete = new Promise((resolve, reject) => {
    bob.on("close", () => reject(new Error("bob was disconnected")));
    alice.on("close", () => reject(new Error("alice was disconnected")));
    bob.on("message", (topic, payload, packet) => {
      const message = { topic, qos: packet.qos, retain: packet.retain, envelope: payload.toString() };
      if (packet.properties?.userProperties) message.properties = { ...packet.properties.userProperties };
      if (seen.push(message) === 3) resolve();
    });
  });
  await bob.subscribeAsync("chat/bob/inbox", { qos: 1 });
  await alice.publishAsync("chat/alice/out/bob", "hello", { qos: 1 });
  await alice.publishAsync("chat/alice/out/bob/js-2", "grüße \u{1F44B}", { qos: 1 });
  await alice.publishAsync("chat/alice/out/bob/js-3", "at QoS 2", { qos: 2 });
  await complete;
  bob.removeAllListeners("close");
  alice.removeAllListeners("close");
  await Promise.all([bob.endAsync(), alice.endAsync()]);
  return seen;
}

// Bob listens and alice writes, both with mqtt.js in Node. Prints what bob saw, a JSON line a message.
// node chat.mjs ws://127.0.0.1:8080/mqtt 5
import mqtt from "mqtt";

import { converse } from "./converse.mjs";

const [url, version] = process.argv.slice(2);
for (const seen of await converse(mqtt, url, Number(version))) console.log(JSON.stringify(seen));

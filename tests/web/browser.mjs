// The conversation of converse.mjs, with mqtt.js in a headless Chromium. Prints what bob saw, a JSON line a message.
// node browser.mjs /usr/bin/chromium ws://127.0.0.1:8080/mqtt 5
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { fileURLToPath } from "node:url";

import { chromium } from "playwright-core";

const [executablePath, url, version] = process.argv.slice(2);

const files = {
  "/": ["text/html", async () => "<!doctype html><meta charset=utf-8><title>chatd</title><link rel=icon href=data:,>"],
  "/mqtt.js": ["text/javascript", () => readFile(fileURLToPath(import.meta.resolve("mqtt/dist/mqtt.esm")))],
  "/converse.mjs": ["text/javascript", () => readFile(new URL("./converse.mjs", import.meta.url))],
};
const server = createServer(async (request, response) => {
  const file = files[request.url ?? ""];
  if (!file) return response.writeHead(404).end();
  response.writeHead(200, { "content-type": file[0] }).end(await file[1]());
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));

const browser = await chromium.launch({
  executablePath,
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
  ],
});
try {
  const page = await browser.newPage();
  page.on("pageerror", (error) => console.error(error));
  page.on("console", (message) => console.error(message.text()));
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  const seen = await page.evaluate(
    async ([url, version]) => {
      const mqtt = (await import("/mqtt.js")).default;
      const { converse } = await import("/converse.mjs");
      return converse(mqtt, url, version);
    },
    [url, Number(version)],
  );
  for (const message of seen) console.log(JSON.stringify(message));
} finally {
  await browser.close();
  server.close();
}

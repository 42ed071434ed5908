// A long history: scrolled to the top without a jump, with a bounded number of elements.
// node history.mjs /usr/bin/chromium http://127.0.0.1:8080/ [5000]
import mqtt from "mqtt";

import { address, more, must, nameOf, scenario, step } from "./stage.mjs";

const count = Number(more[0] ?? 5_000);
const NODES_MAX = 1_500;

async function fill(alice, bob) {
  const url = new URL("/mqtt", address.replace(/^http/, "ws")).href;
  const connect = (username) => mqtt.connectAsync(url, { username, clientId: `${username}-fill`, protocolVersion: 5, reconnectPeriod: 0 });
  const clients = [await connect(alice), await connect(bob)];
  // Nothing waits for them afterwards.
  await clients[0].subscribeAsync(`chat/${alice}/inbox`, { qos: 1 });
  await clients[1].subscribeAsync(`chat/${bob}/inbox`, { qos: 1 });
  const peers = [bob, alice];
  let under_way = [];
  for (let at = 1; at <= count; at += 1) {
    const who = at % 7 < 3 ? 0 : 1;
    const words = `${at} ${"some words of a message ".repeat(at % 11 === 0 ? 12 : 1 + (at % 3))}`.trim();
    under_way.push(clients[who].publishAsync(`chat/${[alice, bob][who]}/out/${peers[who]}`, words, { qos: 1 }));
    // In the order of their numbers, as far as whoever writes next.
    if (at % 7 === 2 || at % 7 === 6 || under_way.length >= 50) under_way = await Promise.all(under_way).then(() => []);
  }
  await Promise.all(under_way);
  await Promise.all(clients.map((client) => client.endAsync()));
}

/** Watches every frame: rows that are on the screen move together, and only by what is scrolled. */
function watch() {
  const scroller = document.querySelector(".scroller");
  window.watched = { jumps: [], blank: 0, nodes: 0 };
  let before = new Map();
  let at = scroller.scrollTop;
  let high = scroller.scrollHeight;
  const look = () => {
    const frame = scroller.getBoundingClientRect();
    const rows = new Map();
    for (const row of scroller.querySelectorAll(".message")) {
      const { top, bottom } = row.getBoundingClientRect();
      if (bottom > frame.top && top < frame.bottom) rows.set(row.dataset.key, bottom);
    }
    const moves = [...rows].filter(([key]) => before.has(key)).map(([key, y]) => y - before.get(key));
    if (rows.size === 0) window.watched.blank += 1;
    if (moves.length > 0 && Math.max(...moves) - Math.min(...moves) > 1) window.watched.jumps.push(`rows moved apart by ${Math.max(...moves) - Math.min(...moves)}`);
    // The wheel turns upwards only: rows go down.
    if (moves.some((move) => move < -1)) window.watched.jumps.push(`a row moved up by ${-Math.min(...moves)}`);
    if (before.size > 0 && rows.size > 0 && moves.length === 0) window.watched.jumps.push(`nothing that was seen is seen any more: from ${at} to ${scroller.scrollTop} of ${high} and ${scroller.scrollHeight}`);
    at = scroller.scrollTop;
    high = scroller.scrollHeight;
    before = rows;
    window.watched.nodes = Math.max(window.watched.nodes, document.querySelectorAll("*").length);
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
}

await scenario(async (stage) => {
  const [a, b] = [nameOf("alice"), nameOf("bob")];
  await fill(a, b);
  step(`${count} messages are stored`);

  const alice = await stage.person(a);
  const { page } = alice;
  await alice.open(b);
  await alice.until((count) => [...document.querySelectorAll(".message")].at(-1)?.dataset.seq === String(count), "the last message", count);
  const box = await page.locator(".scroller").boundingBox();
  await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
  await page.evaluate(watch);
  const started = Date.now();
  for (;;) {
    const before = await page.evaluate(() => document.querySelector(".message").dataset.seq);
    const isTop = await page.evaluate(() => document.querySelector(".top-text")?.textContent.startsWith("This is the beginning") && document.querySelector(".scroller").scrollTop <= innerHeight - document.querySelector(".scroller").scrollHeight);
    if (isTop) break;
    await page.mouse.wheel(0, -Math.floor(box.height * 0.8));
    await alice.until(
      (before) => document.querySelector(".message").dataset.seq !== before || document.querySelector(".top-text")?.textContent.startsWith("This is the beginning"),
      "earlier messages",
      before,
    );
  }
  await alice.until(() => document.querySelector(".message")?.dataset.seq === "1", "the first message");
  const { jumps, blank, nodes } = await page.evaluate(() => window.watched);
  must(jumps.length === 0, `${jumps.length} jumps, the first: ${jumps.slice(0, 3).join("; ")}`);
  must(blank === 0, `nothing was on the screen in ${blank} frames`);
  must(nodes < NODES_MAX, `${nodes} elements`);
  step(`scrolled to the top in ${Math.round((Date.now() - started) / 1_000)} s, at most ${nodes} elements`);

  await page.evaluate(() => {
    const scroller = document.querySelector(".scroller");
    scroller.scrollTop = -scroller.scrollHeight / 2;
  });
  await alice.until(
    () => {
      const frame = document.querySelector(".scroller").getBoundingClientRect();
      return document.elementFromPoint(frame.left + frame.width / 2, frame.top + frame.height / 2)?.closest(".messages") && document.querySelectorAll(".message").length > 5;
    },
    "messages in the middle",
  );
  await page.click(".to-newest");
  await alice.until((count) => [...document.querySelectorAll(".message")].at(-1)?.dataset.seq === String(count), "the newest again", count);
  step("to the middle, and back to the newest");

  await page.keyboard.press("Control+f");
  await page.fill(".search input", "2000 some");
  await alice.until(() => document.querySelector(".search-count")?.textContent.startsWith("1 of"), "a match");
  await alice.until(() => document.querySelector(".message.is-found mark") !== null, "the match is shown");
  step("search finds what is far up");
});

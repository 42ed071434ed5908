// Pictures for the README: a conversation and the list, wide and on a phone, light and dark.
// node screenshots.mjs /usr/bin/chromium http://127.0.0.1:8080/ ../../../docs/images
import { mkdir } from "node:fs/promises";
import { join } from "node:path";

import { more, scenario, step } from "./stage.mjs";

const folder = more[0] ?? new URL("../../../docs/images", import.meta.url).pathname;

await scenario(async (stage) => {
  await mkdir(folder, { recursive: true });
  const bob = await stage.person("bob");
  const zoe = await stage.person("zoe");
  const eve = await stage.person("eve");
  const alice = await stage.person("alice");
  const say = async (one, peer, text) => {
    await one.open(peer);
    await one.write(text);
    await one.ticks(text, peer === "alice" || (await one.page.evaluate(() => document.querySelector(".conversation-how")?.textContent === "online")) ? "delivered" : "stored").catch(() => {});
  };
  await say(eve, "alice", "The photos are here: https://example.com/photos");
  await alice.open("eve");
  await alice.sees("The photos are here: https://example.com/photos");
  await alice.open("zoe");
  await say(zoe, "alice", "Shall we have lunch on Thursday?");
  await say(alice, "zoe", "I would love to.");
  await bob.open("alice");
  await alice.open("bob");
  for (const [who, text] of [
    [bob, "Morning! Did the new release go out?"],
    [alice, "Last night, around eleven."],
    [alice, "No complaints so far, the dashboards look calm."],
    [bob, "Great. I read the notes: https://example.com/releases/2.4"],
    [bob, "> Did the new release go out?\n\nSo nobody has to log in again?"],
    [alice, "Only those with the old client. I wrote to all three of them."],
    [bob, "🎉"],
    [alice, "See you at ten? ☕"],
  ]) {
    await who.write(text);
    await (who === bob ? alice : bob).until((count) => document.querySelectorAll(".message").length >= count, "the message", 1);
    await who.until((text) => [...document.querySelectorAll(".message")].at(-1)?.textContent.includes(text.split("\n").at(-1)), "it is there", text);
    await (who === bob ? alice : bob).until((text) => [...document.querySelectorAll(".message")].at(-1)?.textContent.includes(text.split("\n").at(-1)), "it has arrived", text);
  }
  await alice.ticks("See you at ten? ☕", "read");
  await say(zoe, "alice", "The place at the corner?");
  await say(zoe, "alice", "At half past twelve");
  await alice.until(() => document.querySelector(".list .badge")?.textContent.startsWith("2"), "2 unread messages of zoe");
  step("the conversations are there");

  for (const colorScheme of ["light", "dark"]) {
    await alice.page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
    for (const [name, viewport, hash] of [
      ["wide", { width: 1200, height: 780 }, "bob"],
      ["phone", { width: 390, height: 780 }, "bob"],
      ["phone-list", { width: 390, height: 780 }, ""],
    ]) {
      await alice.page.setViewportSize(viewport);
      await alice.page.evaluate((hash) => (location.hash = hash), hash);
      await alice.until((hash) => (document.querySelector(".conversation h1")?.textContent ?? "") === hash, "the view", hash);
      if (hash) await alice.sees("See you at ten? ☕");
      await alice.page.mouse.move(0, 0);
      await alice.page.screenshot({ path: join(folder, `web-${name}-${colorScheme}.png`), animations: "disabled", caret: "hide" });
      step(`web-${name}-${colorScheme}.png`);
    }
  }
});

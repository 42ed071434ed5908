// Alice is not at her window while bob writes more than it shows: when she is back she sees where it began, and only what she has seen is read.
// node away.mjs /usr/bin/chromium http://127.0.0.1:8080/
import { must, nameOf, scenario, step } from "./stage.mjs";

const COUNT = 40;

/** The line above what is new is in the view, and the last message is not. */
const isAtTheLine = () => {
  const view = document.querySelector(".scroller").getBoundingClientRect();
  const line = document.querySelector(".unread")?.getBoundingClientRect();
  const last = [...document.querySelectorAll(".message")].at(-1)?.getBoundingClientRect();
  return line !== undefined && line.top >= view.top && line.bottom <= view.bottom && (last === undefined || last.bottom > view.bottom + 8);
};

await scenario(async (stage) => {
  const [a, b] = [nameOf("alice"), nameOf("bob")];
  const alice = await stage.person(a);
  await alice.page.evaluate(() => (document.hasFocus = () => true));
  const bob = await stage.person(b);
  await alice.open(b);
  await bob.open(a);
  const write = async (what) => {
    for (let at = 1; at <= COUNT; at += 1) await bob.write(`${what} ${at}`);
  };
  await bob.write("hello");
  await bob.ticks("hello", "read");
  step("what comes while she looks is read");

  await alice.page.evaluate(() => (document.hasFocus = () => false));
  await write("away");
  await bob.ticks(`away ${COUNT}`, "delivered");
  await alice.until(isAtTheLine, "the line is in the view");
  must((await bob.page.locator(".tick-delivered").count()) > 0, "all is read");
  await alice.page.evaluate(() => {
    document.hasFocus = () => true;
    dispatchEvent(new Event("focus"));
  });
  await bob.until(() => document.querySelectorAll(".tick-read").length > 3, "some are read");
  await alice.until(isAtTheLine, "the line is still in the view");
  must((await bob.page.locator(".tick-delivered").count()) > 3, "what she has not seen is read");
  step("she comes back to where it began, and the rest is not read");

  await alice.page.locator(".to-newest").click();
  await bob.ticks(`away ${COUNT}`, "read");
  step("at the end all is read");

  await alice.page.goto("about:blank");
  await write("gone");
  await bob.ticks(`gone ${COUNT}`, "stored");
  await alice.page.goBack();
  await alice.until(() => [...document.querySelectorAll(".unread")].length === 1, "the line");
  await alice.until(isAtTheLine, "the line is in the view after a reload");
  await alice.page.bringToFront();
  await alice.page.waitForTimeout(500);
  must((await alice.page.evaluate(isAtTheLine)), "the view has moved");
  await bob.ticks(`gone ${COUNT}`, "delivered");
  step("the same after a reload");
});

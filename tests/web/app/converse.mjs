// Alice and bob, each in a browser: both ways, ticks to read, typing, presence, edit, unsend, delete, block, reload.
// node converse.mjs /usr/bin/chromium http://127.0.0.1:8080/
import { must, nameOf, scenario, step } from "./stage.mjs";

await scenario(async (stage) => {
  const [a, b] = [nameOf("alice"), nameOf("bob")];
  const alice = await stage.person(a);
  const bob = await stage.person(b);
  step("both are logged in");

  await alice.open(b);
  await alice.write("hello bob");
  await alice.ticks("hello bob", "delivered");
  step("alice's message is delivered before bob has opened it");

  await bob.until((a) => document.querySelector(`.list-row[href="#${a}"] .badge`)?.textContent.startsWith("1"), "a badge of 1 in the list", a);
  await bob.until(() => document.title.startsWith("(1)"), "1 in the title");
  await bob.page.click(`.list-row[href="#${a}"]`);
  await bob.sees("hello bob");
  await alice.ticks("hello bob", "read");
  await bob.until(() => document.querySelector(".list .badge") === null, "the badge is gone");
  step("bob reads it, alice sees that");

  await bob.page.type(".compose textarea", "hello alice");
  await alice.until(() => document.querySelector(".conversation-how")?.textContent === "typing…", "bob is typing");
  await bob.page.press(".compose textarea", "Enter");
  await alice.sees("hello alice");
  await alice.until(() => document.querySelector(".conversation-how")?.textContent === "online", "bob is online and does not type any more");
  await bob.ticks("hello alice", "read");
  step("bob types and answers, alice reads it");

  await bob.choose("hello alice", "Edit");
  await bob.page.fill(".compose textarea", "hello dear alice");
  await bob.page.press(".compose textarea", "Enter");
  await alice.sees("hello dear alice");
  await alice.until(() => document.querySelector(".message-edited") !== null, "it says that it was edited");
  step("an edit is seen by the other");

  await bob.write("never mind");
  await alice.sees("never mind");
  await bob.choose("never mind", "Unsend for everybody");
  await bob.page.locator(".dialog .button-danger").click();
  for (const one of [alice, bob]) await one.until(() => document.querySelector(".words.is-unsent") !== null, "a message was taken back");
  must(!(await alice.texts()).includes("never mind"), "what was taken back is still there");
  step("an unsend is seen by the other");

  await alice.choose("hello bob", "Delete for me");
  await alice.page.locator(".dialog .button-danger").click();
  await alice.until(() => ![...document.querySelectorAll(".words")].some(({ textContent }) => textContent === "hello bob"), "it is gone for alice");
  must((await bob.texts()).includes("hello bob"), "what alice deleted for herself is gone for bob");
  step("a message is deleted for one");

  await alice.choose("hello dear alice", "Reply with quote");
  await alice.page.type(".compose textarea", "thanks");
  await alice.page.press(".compose textarea", "Enter");
  await bob.until(() => [...document.querySelectorAll("blockquote")].some(({ textContent }) => textContent === "hello dear alice"), "a quote");
  step("alice replies with a quote");

  await alice.page.fill(".compose textarea", "a draft");
  await alice.page.reload();
  await alice.until(() => document.querySelector(".compose textarea")?.value === "a draft", "the draft after a reload");
  await alice.sees("hello dear alice");
  must(!(await alice.texts()).includes("hello bob"), "what was deleted is there again after a reload");
  await alice.page.fill(".compose textarea", "");
  step("a reload is logged in, with the conversation and the draft");

  await alice.page.getByRole("button", { name: "More" }).click();
  await alice.page.getByRole("menuitem", { name: `Block ${b}` }).click();
  await alice.page.locator(".dialog .button-danger").click();
  await alice.until(() => document.querySelector(".blocked-bar") !== null, "bob is blocked");
  await bob.write("do you hear me?");
  await bob.ticks("do you hear me?", "stored");
  await alice.page.locator(".blocked-bar .link-button").click();
  await alice.until(() => document.querySelector(".blocked-bar") === null, "bob is not blocked any more");
  await bob.write("and now?");
  await alice.sees("and now?");
  must(!(await alice.texts()).includes("do you hear me?"), "what a blocked user sent is shown");
  step("who is blocked is not heard");
});

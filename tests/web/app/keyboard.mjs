// Everything with the keyboard alone: no mouse, no focus but by keys.
// node keyboard.mjs /usr/bin/chromium http://127.0.0.1:8080/
import { must, nameOf, scenario, step } from "./stage.mjs";

await scenario(async (stage) => {
  const [a, b, z] = [nameOf("alice"), nameOf("bob"), nameOf("zoe")];
  const bob = await stage.person(b);
  const context = await stage.context();
  const alice = await stage.page(context, a);
  const { keyboard } = alice.page;
  const focused = (what, is, arg) => alice.until(is, `the focus is on ${what}`, arg);

  await focused("the name", () => document.activeElement?.getAttribute("name") === "username");
  await keyboard.type(a);
  await keyboard.press("Enter");
  await alice.until(() => document.querySelector(".app") !== null, "logged in");
  step("log in");

  await keyboard.press("Control+k");
  await focused("the name of the other", () => document.activeElement?.closest("dialog") !== null && document.activeElement?.tagName === "INPUT");
  await keyboard.type("Not A Name");
  await keyboard.press("Enter");
  await alice.until(() => document.querySelector("#begin-problem")?.textContent !== "", "what is wrong with the name");
  await keyboard.press("Control+a");
  await keyboard.type(b);
  await keyboard.press("Enter");
  const composing = () => document.activeElement?.matches(".compose textarea");
  await focused("what is written", composing);
  step("a new chat, with a wrong name first");

  await keyboard.type("hello");
  await keyboard.press("Shift+Enter");
  await keyboard.type("bob");
  await keyboard.press("Enter");
  await bob.open(a);
  await bob.sees("hello\nbob");
  step("send, with two lines");

  await keyboard.press("ArrowUp");
  await alice.until(() => document.querySelector(".compose-editing") !== null, "editing");
  await keyboard.type("!");
  await keyboard.press("Enter");
  await bob.sees("hello\nbob!");
  step("edit the last message");

  await bob.write("how are you?");
  await alice.sees("how are you?");
  await focused("what is written", composing);
  await keyboard.press("Shift+Tab");
  for (let tabs = 0; tabs < 4 && !(await alice.page.evaluate(() => document.activeElement?.matches("li.message"))); tabs += 1) await keyboard.press("Shift+Tab");
  await focused("a message", () => document.activeElement?.matches("li.message"));
  await keyboard.press("ArrowUp");
  await focused("the message above", () => document.activeElement?.textContent.includes("hello"));
  await keyboard.press("Enter");
  await focused("its menu", () => document.activeElement?.getAttribute("role") === "menuitem");
  await keyboard.press("ArrowDown");
  await keyboard.press("ArrowDown");
  await keyboard.press("ArrowDown");
  await focused("Unsend", () => document.activeElement?.textContent === "Unsend for everybody");
  await keyboard.press("Enter");
  await alice.until(() => document.querySelector("dialog[open]") !== null, "whether it is meant");
  await keyboard.press("Tab");
  await keyboard.press("Tab");
  for (let tabs = 0; tabs < 4 && !(await alice.page.evaluate(() => document.activeElement?.matches(".button-danger"))); tabs += 1) await keyboard.press("Tab");
  await keyboard.press("Enter");
  await bob.until(() => document.querySelector(".is-unsent") !== null, "it was taken back");
  step("through the messages, unsend one");

  await focused("somewhere in the page", () => document.activeElement !== document.body);
  await keyboard.press("Control+f");
  await focused("search", () => document.activeElement?.matches(".search input"));
  await keyboard.type("how");
  await alice.until(() => document.querySelector("mark") !== null, "a match");
  await keyboard.press("Enter");
  await keyboard.press("Escape");
  await focused("what is written", composing);
  step("search");

  await keyboard.press("Tab");
  await focused("emoji", () => document.activeElement?.getAttribute("aria-label") === "Emoji");
  await keyboard.press("Enter");
  await focused("an emoji", () => document.activeElement?.closest(".emoji") !== null);
  await keyboard.press("ArrowRight");
  await keyboard.press("ArrowDown");
  await keyboard.press("Enter");
  await keyboard.press("Escape");
  await focused("what is written", composing);
  must((await alice.page.inputValue(".compose textarea")) !== "", "no emoji was put in");
  await keyboard.press("Enter");
  await bob.until(() => document.querySelector(".is-jumbo") !== null, "an emoji");
  step("emoji");

  await keyboard.press("Control+k");
  await focused("the name of the other", () => document.activeElement?.closest("dialog") !== null && document.activeElement?.tagName === "INPUT");
  await keyboard.type(z);
  await keyboard.press("Enter");
  await alice.until((z) => document.querySelector(".conversation h1")?.textContent === z, "the conversation with zoe", z);
  await focused("what is written", composing);
  await keyboard.type("hello zoe");
  await keyboard.press("Enter");
  await alice.ticks("hello zoe", "stored");
  await keyboard.press("Alt+ArrowDown");
  await alice.until((b) => document.querySelector(".conversation h1")?.textContent === b, "the conversation with bob", b);
  step("from one conversation to the next");

  const reach = async (what, selector) => {
    for (let tabs = 0; tabs < 40; tabs += 1) {
      if (await alice.page.evaluate((selector) => document.activeElement?.matches(selector), selector)) return;
      await keyboard.press("Tab");
    }
    must(false, `${what} cannot be reached with Tab`);
  };
  await reach("the menu", '.side-header button[aria-haspopup="menu"]');
  await keyboard.press("Enter");
  await focused("the menu", () => document.activeElement?.getAttribute("role") === "menuitemradio");
  await keyboard.press("ArrowDown");
  await keyboard.press("ArrowDown");
  await keyboard.press("Enter");
  await alice.until(() => document.documentElement.dataset.theme === "dark", "dark");
  step("another theme");

  await reach("a conversation of the list", ".list-row");
  await keyboard.press("ArrowDown");
  await keyboard.press("Enter");
  await alice.until((b) => document.querySelector(".conversation h1")?.textContent === b, "bob, by the list", b);
  await reach("the menu of the conversation", '.conversation-header button[aria-haspopup="menu"]');
  await keyboard.press("Enter");
  await keyboard.press("Enter");
  await alice.until(() => document.querySelector("dialog[open]") !== null, "whether to block");
  await keyboard.press("Escape");
  await alice.until(() => document.querySelector("dialog[open]") === null, "not blocked");
  step("the list, and the menu of a conversation");

  await reach("the menu", '.side-header button[aria-haspopup="menu"]');
  await keyboard.press("Enter");
  await keyboard.press("ArrowUp");
  await focused("log out", () => document.activeElement?.textContent === "Log out");
  await keyboard.press("Enter");
  await reach("the answer", ".dialog .button-danger");
  await keyboard.press("Enter");
  await alice.until(() => document.querySelector(".login") !== null, "logged out");
  await focused("the name", () => document.activeElement?.getAttribute("name") === "username");
  step("log out");
});

// axe finds no violation: in both themes, on a wide screen and on a phone, in every view.
// node axe.mjs /usr/bin/chromium http://127.0.0.1:8080/ …/node_modules/axe-core/axe.min.js
import { readFile } from "node:fs/promises";

import { more, must, nameOf, scenario, step } from "./stage.mjs";

const axe = await readFile(more[0] ?? new URL("../../../clients/web/node_modules/axe-core/axe.min.js", import.meta.url), "utf8");

async function check(page, view) {
  // The page's own rules forbid scripts from elsewhere; a test may run one all the same.
  await page.evaluate(axe);
  const found = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  const told = found.violations.map(({ id, help, nodes }) => `${id} (${help}): ${nodes.slice(0, 3).map(({ html, any }) => `${html.slice(0, 160)} ${any[0]?.message ?? ""}`).join(" ; ")}`);
  must(told.length === 0, `${view}: ${told.join("\n")}`);
}

await scenario(async (stage) => {
  for (const [size, viewport] of Object.entries({ wide: { width: 1100, height: 760 }, phone: { width: 390, height: 780 } })) {
    for (const colorScheme of ["light", "dark"]) {
      const view = (name) => `${name}, ${size}, ${colorScheme}`;
      const [a, b] = [nameOf("alice"), nameOf("bob")];
      const context = await stage.context({ viewport, colorScheme, reducedMotion: "reduce" });
      const alice = await stage.page(context, a);
      const { page } = alice;
      await check(page, view("log in"));
      await page.getByRole("button", { name: "I have a password" }).click();
      await check(page, view("log in with a password"));
      await page.fill("input[name=username]", a);
      await page.getByRole("button", { name: "Continue" }).click();
      await alice.until(() => document.querySelector(".list-none-title") !== null, "no conversations yet");
      await check(page, view("no conversations"));

      await page.getByRole("button", { name: "New chat" }).click();
      await check(page, view("new chat"));
      await page.keyboard.type(b);
      await page.keyboard.press("Enter");
      await alice.until((b) => document.querySelector(".conversation h1")?.textContent === b, "the conversation", b);
      await check(page, view("an empty conversation"));

      const bob = await stage.person(b);
      await bob.open(a);
      await bob.write("hello https://example.com/ ☕");
      await alice.write("hello\n> quoted\nand said");
      await bob.write("oops");
      await bob.choose("oops", "Unsend for everybody");
      await bob.page.locator(".dialog .button-danger").click();
      await alice.until(() => document.querySelector(".is-unsent") !== null, "a message was taken back");
      await check(page, view("a conversation"));

      await page.locator(".message.is-mine .message-menu").first().click();
      await check(page, view("the menu of a message"));
      await page.keyboard.press("Escape");
      await page.keyboard.press("Control+f");
      await page.fill(".search input", "hello");
      await alice.until(() => document.querySelector("mark") !== null, "a match");
      await check(page, view("search"));
      await page.keyboard.press("Escape");
      await page.getByRole("button", { name: "Emoji" }).click();
      await alice.until(() => document.querySelector(".emoji") !== null, "emoji");
      await check(page, view("emoji"));
      await page.keyboard.press("Escape");
      await page.locator(".compose textarea").press("ArrowUp");
      await alice.until(() => document.querySelector(".compose-editing") !== null, "editing");
      await check(page, view("editing"));
      await page.keyboard.press("Escape");
      await page.getByRole("button", { name: "More" }).click();
      await page.getByRole("menuitem", { name: `Block ${b}` }).click();
      await check(page, view("a question"));
      await page.keyboard.press("Escape");

      await page.evaluate(() => (location.hash = ""));
      await bob.write("something new");
      await alice.until(() => document.querySelector(".list .badge") !== null, "a badge");
      await check(page, view("the list"));
      await page.getByRole("button", { name: "Menu" }).click();
      await check(page, view("the menu"));
      await page.getByRole("menuitem", { name: "Keyboard shortcuts" }).click();
      await check(page, view("keyboard shortcuts"));
      await context.close();
      await bob.page.context().close();
      stage.people.length = 0;
      step(`no violations: ${size}, ${colorScheme}`);
    }
  }
});

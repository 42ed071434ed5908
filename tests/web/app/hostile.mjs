// What others send is harmless: markup, scripts, text that turns the direction of writing, what is invisible, what is long.
// node hostile.mjs /usr/bin/chromium http://127.0.0.1:8080/
import mqtt from "mqtt";

import { address, must, nameOf, scenario, step } from "./stage.mjs";

const MARKUP = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script><svg onload="window.harmed=1">';
const TURNED = "\u202e\u2066\u2067\u202dcod.exe\u202e\u202e";
const INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff";
const LONG = "wide".repeat(4_096);
const ZALGO = `Z${"\u0301\u0327\u0334".repeat(300)}`;
const LINKS = "javascript:window.harmed=1 data:text/html,<script>1</script> https://example.com/%3Cscript%3E https://user:pass@example.com/ (https://example.com/a_(b)).";

await scenario(async (stage) => {
  const [a, e] = [nameOf("alice"), nameOf("eve")];
  const url = new URL("/mqtt", address.replace(/^http/, "ws")).href;
  const eve = await mqtt.connectAsync(url, { username: e, clientId: `${e}-hostile`, protocolVersion: 5, reconnectPeriod: 0 });
  const texts = [MARKUP, TURNED, INVISIBLE, LONG, ZALGO, LINKS, "x\u0000y\u0007\u001b[2J", "\n\n\n", "after all"];
  for (const text of texts) await eve.publishAsync(`chat/${e}/out/${a}`, text, { qos: 1 }).catch((error) => step(`the server refuses ${JSON.stringify(text.slice(0, 20))}: ${error.message}`));
  await eve.endAsync();

  const alice = await stage.person(a);
  const quiet = await alice.page.locator(".side").boundingBox();
  await alice.open(e);
  await alice.sees("after all");
  await alice.sees(MARKUP);
  step("everything is shown");

  must(!(await alice.page.evaluate(() => "harmed" in window)), "a script of a message has run");
  must((await alice.page.locator(".message :is(img, script, svg:not(.icon, .tick), iframe)").count()) === 0, "markup of a message became elements");
  step("markup is words");

  const links = await alice.page.evaluate(() => [...document.querySelectorAll(".words a")].map(({ href, rel, target, textContent }) => ({ href, rel, target, textContent })));
  must(links.length === 2, `there are ${links.length} links: ${JSON.stringify(links)}`);
  must(links.every(({ href, rel, target }) => href.startsWith("https://example.com/") && rel.includes("noopener") && target === "_blank"), `links are not safe: ${JSON.stringify(links)}`);
  must(links[1].textContent === "https://example.com/a_(b)", `the end of a link is wrong: ${links[1].textContent}`);
  step("links are safe: only http and https, and no names in them");

  const { isWithin, isSideStill } = await alice.page.evaluate((side) => {
    const frame = document.querySelector(".messages").getBoundingClientRect();
    const bubbles = [...document.querySelectorAll(".bubble")].map((bubble) => bubble.getBoundingClientRect());
    const now = document.querySelector(".side").getBoundingClientRect();
    return {
      isWithin: bubbles.every(({ left, right }) => left >= frame.left && right <= frame.right) && document.documentElement.scrollWidth <= innerWidth,
      isSideStill: now.width === side.width && now.left === side.x,
    };
  }, quiet);
  must(isWithin && isSideStill, "a message is wider than its place");
  step("long words stay in their place");

  await alice.until(() => [...document.querySelectorAll(".words.is-unsent")].some(({ textContent }) => textContent.startsWith("A message without")), "what is invisible is said to be");
  const feet = await alice.page.evaluate(() =>
    [...document.querySelectorAll(".message")].map((message) => {
      const foot = message.querySelector(".message-foot").getBoundingClientRect();
      const bubble = message.querySelector(".bubble").getBoundingClientRect();
      return foot.right <= bubble.right + 1 && foot.left >= bubble.left - 1;
    }),
  );
  must(feet.every(Boolean), "a text has turned what is around it");
  step("nothing turns what is around it, and nothing is invisible");

  await alice.page.getByRole("button", { name: "Show all" }).first().click();
  await alice.until((length) => [...document.querySelectorAll(".words")].some(({ textContent }) => textContent.length === length), "all of the long text", LONG.length);
  step("16 KiB are shown when asked for");
});

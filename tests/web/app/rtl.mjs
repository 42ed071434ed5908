// Words have the direction that they are written in, in a page of either direction: a translation from right to left turns it round. Nothing is wider than a small phone.
// node rtl.mjs /usr/bin/chromium http://127.0.0.1:8080/
import { must, nameOf, scenario, step } from "./stage.mjs";

const HEBREW = "שלום, נתראה מחר ב־10:00?";
const ENGLISH = "See you at ten, at the corner!";
const LONG_HEBREW = "מילים ארוכות ".repeat(30).trim();
const LONG_ENGLISH = "some longer words ".repeat(20).trim();
const PHONE = { width: 360, height: 740 };

await scenario(async (stage) => {
  for (const [name, isTurned, viewport] of [
    ["wide, from right to left", true, { width: 1100, height: 760 }],
    ["a phone, from right to left", true, PHONE],
    ["a phone, from left to right", false, PHONE],
  ]) {
    const [a, b] = [nameOf("alice"), nameOf("bob")];
    const context = await stage.context({ viewport, serviceWorkers: "block" });
    // What the texts say of their direction is all that a translation changes here.
    let turned = 0;
    if (isTurned) await context.route("**/assets/*.js", async (route) => {
      const answer = await route.fetch();
      const body = (await answer.text()).replace(/lang:"en",dir:"ltr"/, () => (turned += 1) && 'lang:"he",dir:"rtl"');
      await route.fulfill({ response: answer, body });
    });
    const alice = await stage.page(context, `alice, ${name}`);
    const { page } = alice;
    await alice.logIn(a);
    must(turned === (isTurned ? 1 : 0), "the texts do not say which direction they have");
    const narrow = async (view) => {
      const wide = await page.evaluate(() =>
        [document.documentElement, ...document.querySelectorAll(".app, .side, .list, .stage, .scroller, .compose, .login, dialog, .menu")]
          .filter((element) => element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0)
          .map((element) => `${element.className || element.tagName}: ${element.scrollWidth} in ${element.clientWidth}`),
      );
      must(wide.length === 0, `${view}, ${name}, is wider than its place: ${wide.join(", ")}`);
    };
    const is = await page.evaluate(() => `${document.documentElement.lang} ${document.documentElement.dir}`);
    must(is === (isTurned ? "he rtl" : "en ltr"), `the page is ${is}`);
    await narrow("the list");

    const bob = await stage.person(b);
    await bob.open(a);
    await alice.open(b);
    for (const text of [HEBREW, ENGLISH]) {
      await alice.write(text);
      await bob.write(`> ${text}\n\n${text}`);
    }
    for (const text of [LONG_HEBREW, LONG_ENGLISH]) await bob.write(text);
    await alice.sees(LONG_ENGLISH);
    const rows = await page.evaluate(() =>
      [...document.querySelectorAll(".message")].map((message) => {
        const bubble = message.querySelector(".bubble").getBoundingClientRect();
        const list = message.parentElement.getBoundingClientRect();
        const words = message.querySelector(".words:last-of-type");
        const range = document.createRange();
        range.selectNodeContents(words);
        const rects = [...range.getClientRects()];
        const line = rects.filter(({ top }) => Math.abs(top - rects.at(-1).top) < 4);
        const text = { left: Math.min(...line.map(({ left }) => left)), right: Math.max(...line.map(({ right }) => right)) };
        const foot = message.querySelector(".message-foot").getBoundingClientRect();
        const block = message.querySelector("blockquote");
        return {
          text: words.textContent,
          isMine: message.matches(".is-mine"),
          dir: words.getAttribute("dir"),
          direction: getComputedStyle(words).direction,
          atLeft: bubble.left - list.left < list.right - bubble.right,
          startsAt: getComputedStyle(words).direction === "rtl" ? bubble.right - text.right : text.left - bubble.left,
          footAtLeft: foot.left - bubble.left < bubble.right - foot.right,
          quoted: block && getComputedStyle(block).borderInlineStartWidth !== "0px" ? getComputedStyle(block).direction : undefined,
        };
      }),
    );
    must(rows.length === 6, `there are ${rows.length} messages`);
    for (const row of rows) {
      const isLong = row.text === LONG_HEBREW || row.text === LONG_ENGLISH;
      const wanted = row.text === ENGLISH || row.text === LONG_ENGLISH ? "ltr" : "rtl";
      must(row.dir === "auto" && row.direction === wanted && (row.quoted ?? wanted) === wanted, `“${row.text.slice(0, 20)}” is written ${JSON.stringify(row)}`);
      must(row.startsAt >= 0 && row.startsAt < 30, `“${row.text.slice(0, 20)}” does not begin where it is read from: ${JSON.stringify(row)}`);
      must(row.footAtLeft === (wanted === "rtl"), `the time of “${row.text.slice(0, 20)}” is where it begins`);
      // One's own are at the end of the line.
      if (!isLong) must(row.atLeft === (row.isMine === isTurned), `“${row.text.slice(0, 20)}” is on the wrong side: ${JSON.stringify(row)}`);
    }
    await narrow("a conversation");
    await page.fill(".compose textarea", HEBREW);
    must((await page.evaluate(() => getComputedStyle(document.querySelector(".compose textarea")).direction)) === "rtl", "what is written is turned");
    const [send, field, header] = await page.evaluate(() => [".send", ".compose textarea", ".conversation-header .avatar"].map((one) => document.querySelector(one).getBoundingClientRect().x));
    must(send < field === isTurned && (viewport !== PHONE || header < viewport.width / 2 !== isTurned), "the page is the wrong way round");
    if (viewport !== PHONE) must(await page.evaluate(() => document.querySelector(".side").getBoundingClientRect().right === innerWidth), "the list is not on the right");
    step(`${name}: words begin where they are read from`);

    await page.locator(".message.is-mine .message-menu").first().click({ force: true });
    await alice.until(() => {
      const menu = document.querySelector(".menu")?.getBoundingClientRect();
      return menu !== undefined && menu.left >= 0 && menu.right <= innerWidth;
    }, "the menu of a message is in the page");
    await narrow("a menu");
    await page.keyboard.press("Escape");
    await page.getByRole("button", { name: "Emoji" }).click();
    await alice.until(() => {
      const emoji = document.querySelector(".emoji")?.getBoundingClientRect();
      return emoji !== undefined && emoji.left >= 0 && emoji.right <= innerWidth;
    }, "the emoji are in the page");
    await page.keyboard.press("Escape");
    await page.keyboard.press("Control+f");
    await narrow("search");
    await page.keyboard.press("Escape");
    await page.keyboard.press("Control+k");
    await page.getByRole("dialog").waitFor();
    await narrow("a new chat");
    await page.keyboard.press("Escape");
    step(`${name}: nothing is wider than its place`);
    await context.close();
    await bob.page.context().close();
    stage.people.length = 0;
  }
});

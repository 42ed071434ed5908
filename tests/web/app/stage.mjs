// What the scenarios of the web chat share: a browser, people at pages, steps that are printed, and waiting for what has to become true.
// A scenario is called with the path of a Chromium and the address of the page; it prints a line for each step, and ends with a sentence and code 1 if something
// is not as it has to be.
import { createServer, connect } from "node:net";
import { createInterface } from "node:readline";

import { chromium } from "playwright-core";

const ARGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
export const PATIENCE_MS = 30_000;

export const [, , executablePath, address, ...more] = process.argv;

export const step = (text) => console.log(text);

export class Wrong extends Error {}

export function must(is, sentence) {
  if (!is) throw new Wrong(sentence);
}

let lines;

/** Has whoever runs the scenario do something: a line to standard output, and one back when it is done. */
export async function ask(what) {
  lines ??= createInterface({ input: process.stdin })[Symbol.asyncIterator]();
  step(what);
  must(!(await lines.next()).done, `nobody answered: ${what}`);
}

/** Runs a scenario: `play(stage)`. */
export async function scenario(play) {
  if (!executablePath || !address) {
    console.error("usage: node SCENARIO.mjs CHROMIUM URL …");
    process.exit(2);
  }
  const browser = await chromium.launch({ executablePath, args: ARGS });
  const stage = new Stage(browser);
  try {
    await play(stage);
    must(stage.errors.length === 0, `errors in the page: ${stage.errors.join(" | ")}`);
    step("all is as it has to be");
  } catch (error) {
    console.error(error instanceof Wrong ? error.message : error);
    for (const { page, name } of stage.people) {
      console.error(`${name} is at ${await page.evaluate(() => document.activeElement?.outerHTML.slice(0, 200)).catch(() => "")}`);
      console.error(`${name} sees: ${await page.evaluate(() => document.body.innerText.slice(-1_500)).catch((gone) => gone.message)}`);
      if (process.env.SHOTS) await page.screenshot({ path: `${process.env.SHOTS}/${name}.png` }).catch(() => {});
    }
    for (const line of stage.errors) console.error(`in the page: ${line}`);
    process.exitCode = 1;
  } finally {
    await browser.close();
    for (const wire of stage.wires) wire.close();
    // Those who are told what to do by lines would wait for more.
    process.stdin.destroy();
  }
}

export class Stage {
  errors = [];
  people = [];
  wires = [];

  constructor(browser) {
    this.browser = browser;
  }

  /** A browser of somebody's own. */
  async context(options = {}) {
    return this.browser.newContext({ viewport: { width: 1100, height: 760 }, locale: "en-GB", ...options });
  }

  async page(context, name, url = address) {
    const page = await context.newPage();
    page.setDefaultTimeout(PATIENCE_MS);
    page.on("pageerror", (error) => this.errors.push(`${name}: ${error.message}`));
    page.on("console", (message) => {
      // What the network does is shown by the page itself.
      if (message.type() === "error" && !/WebSocket connection|WebSocket is already|Failed to load resource|ERR_/.test(message.text())) this.errors.push(`${name}: ${message.text()}`);
    });
    page.on("dialog", (dialog) => {
      this.errors.push(`${name}: a dialog: ${dialog.message()}`);
      void dialog.dismiss();
    });
    await page.goto(url);
    const person = new Person(page, name);
    this.people.push(person);
    return person;
  }

  /** Somebody in a browser of their own, logged in. */
  async person(user, { password, url, ...options } = {}) {
    const context = await this.context(options);
    const person = await this.page(context, user, url);
    await person.logIn(user, password);
    return person;
  }

  /** A way to the server that can be cut: the address of the page through it. */
  async wire() {
    const wire = new Wire(new URL(address));
    await wire.open();
    this.wires.push(wire);
    return wire;
  }
}

export class Person {
  constructor(page, name) {
    this.page = page;
    this.name = name;
  }

  async logIn(user, password) {
    const { page } = this;
    await page.fill("input[name=username]", user);
    if (password !== undefined) {
      await page.getByRole("button", { name: "I have a password or token" }).click();
      await page.fill("input[name=password]", password);
    }
    await page.getByRole("button", { name: "Continue" }).click();
    await this.until(() => document.querySelector(".app") !== null, "logged in");
  }

  /** Begins a conversation, or opens it. */
  async open(peer) {
    await this.page.evaluate((peer) => (location.hash = peer), peer);
    await this.until((peer) => document.querySelector(".conversation h1")?.textContent === peer, `the conversation with ${peer} is open`, peer);
  }

  async write(text) {
    await this.page.fill(".compose textarea", text);
    await this.page.press(".compose textarea", "Enter");
  }

  /** Waits until `is` is true in the page. */
  async until(is, what, arg) {
    try {
      await this.page.waitForFunction(is, arg, { timeout: PATIENCE_MS });
    } catch (error) {
      throw error.name === "TimeoutError" ? new Wrong(`${this.name} waited in vain for: ${what}`) : error;
    }
  }

  sees(text) {
    return this.until((text) => [...document.querySelectorAll(".message .words")].some((words) => words.textContent === text), `the message “${text.slice(0, 60)}”`, text);
  }

  /** The last message with that text has that tick: `waiting to be sent`, `stored`, `delivered` or `read`. */
  ticks(text, tick) {
    return this.until(
      ([text, tick]) => {
        const message = [...document.querySelectorAll(".message")].findLast((one) => one.querySelector(".words")?.textContent === text);
        return message?.querySelector(".message-tick .for-ears")?.textContent === tick;
      },
      `“${text.slice(0, 60)}” is ${tick}`,
      [text, tick],
    );
  }

  /** The words of the messages that are drawn. */
  texts() {
    return this.page.evaluate(() => [...document.querySelectorAll(".message")].map((one) => [...one.querySelectorAll(".words")].map(({ textContent }) => textContent).join("\n")));
  }

  connected() {
    return this.until(() => document.querySelector(".banner-lost, .banner-connecting") === null, "the banner is gone");
  }

  lost() {
    return this.until(() => document.querySelector(".banner") !== null, "the banner says that there is no connection");
  }

  /** Chooses in the menu of the last message with that text. */
  async choose(text, item) {
    const message = this.page.locator(".message", { hasText: text }).last();
    await message.hover();
    await message.locator(".message-menu").click();
    await this.page.getByRole("menuitem", { name: item }).click();
  }
}

/** Passes on what goes between a port of its own and the server, until it is cut. */
class Wire {
  #sockets = new Set();
  #isCut = false;

  constructor(target) {
    this.target = target;
    this.server = createServer((near) => {
      if (this.#isCut) return near.destroy();
      const far = connect(Number(target.port), target.hostname);
      for (const [from, to] of [[near, far], [far, near]]) {
        this.#sockets.add(from);
        from.pipe(to);
        from.on("error", () => to.destroy());
        from.on("close", () => {
          this.#sockets.delete(from);
          to.destroy();
        });
      }
    });
  }

  async open() {
    await new Promise((resolve) => this.server.listen(0, "127.0.0.1", resolve));
    this.url = new URL(this.target.pathname, `http://127.0.0.1:${this.server.address().port}`).href;
  }

  cut() {
    this.#isCut = true;
    for (const socket of this.#sockets) socket.destroy();
  }

  mend() {
    this.#isCut = false;
  }

  close() {
    this.cut();
    this.server.close();
  }
}

/** A name that nobody had before: scenarios share a server. */
export const nameOf = (name) => `${name}-${Math.random().toString(36).slice(2, 8)}`;

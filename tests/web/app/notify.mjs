// Whoever is not at the page is told of messages by notifications: once however many tabs there are, not while one of them is looked at, not of what was written
// on another device, not without leave; and not any more when it is read. A click opens the conversation.
// node notify.mjs /usr/bin/chromium http://127.0.0.1:8080/
import { must, nameOf, scenario, step } from "./stage.mjs";

/** What a page shows is written down. */
function watch() {
  globalThis.shown = [];
  const { showNotification } = ServiceWorkerRegistration.prototype;
  ServiceWorkerRegistration.prototype.showNotification = function (title, options) {
    globalThis.shown.push(`${title}: ${options.body}`);
    return showNotification.call(this, title, options);
  };
}

await scenario(async (stage) => {
  const [a, b] = [nameOf("alice"), nameOf("bob")];
  const context = await stage.context({ permissions: ["notifications"] });
  await context.addInitScript(watch);
  const first = await stage.page(context, "alice's first tab");
  await first.logIn(a);
  const second = await stage.page(context, "alice's second tab");
  await second.until(() => document.querySelector(".app") !== null, "logged in, as in the first tab");
  const device = await stage.person(a);
  device.name = "alice's other device";
  const bob = await stage.person(b);
  await bob.open(a);
  const tabs = [first, second];
  for (const tab of tabs) await tab.page.evaluate(() => navigator.serviceWorker.ready.then(() => undefined));
  const worker = context.serviceWorkers()[0] ?? (await context.waitForEvent("serviceworker"));

  /** One tab, or none, is looked at. */
  const lookAt = async (which) => {
    for (const tab of [...tabs.filter((tab) => tab !== which), ...tabs.filter((tab) => tab === which)]) {
      await tab.page.evaluate((is) => {
        document.hasFocus = () => is;
        dispatchEvent(new Event(is ? "focus" : "blur"));
      }, tab === which);
    }
    await first.until(async (is) => (await navigator.locks.query()).held.some(({ name }) => name.startsWith("looked at")) === is, "the tabs know who looks", which !== undefined);
  };
  /** By all tabs together, in no order. */
  const shown = async () => (await Promise.all(tabs.map(({ page }) => page.evaluate(() => globalThis.shown)))).flat();
  const told = [];
  const areTold = async (text) => {
    told.push(`${b}: ${text}`);
    for (const until = Date.now() + 20_000; !(await shown()).includes(`${b}: ${text}`); await first.page.waitForTimeout(50)) must(Date.now() < until, `nobody is told of “${text}”`);
    must((await shown()).toSorted().join() === told.toSorted().join(), `told of ${(await shown()).join(" | ")} in place of ${told.join(" | ")}`);
  };
  const all = () => worker.evaluate(async () => (await self.registration.getNotifications()).map(({ title, body }) => `${title}: ${body}`));
  const isUnread = (count) => (person) => person.until((count) => document.title === `(${count}) Chat`, `${count} unread messages`, count);

  await lookAt(undefined);
  await bob.write("nobody has asked for it");
  for (const tab of tabs) await isUnread(1)(tab);
  await first.page.getByRole("button", { name: "Menu" }).click();
  await first.page.getByRole("menuitem", { name: "Turn on notifications" }).click();
  await first.until(() => document.querySelector(".notice")?.textContent.startsWith("Notifications are on"), "notifications are on");
  await second.page.getByRole("button", { name: "Menu" }).click();
  await second.page.getByRole("menuitem", { name: "Turn off notifications" }).waitFor();
  await second.page.keyboard.press("Escape");
  await bob.write("psst");
  await areTold("psst");
  await bob.write("and   what\nabout me?");
  await areTold("and what about me?");
  must((await all()).join() === `${b}: and what about me?`, `there are ${(await all()).join(" | ")}`);
  step("two tabs, nobody looks: one notification of each message, and of one sender the newest stays");

  await lookAt(second);
  await bob.write("she is there");
  for (const tab of tabs) await isUnread(4)(tab);
  await lookAt(undefined);
  await bob.write("she is gone");
  await areTold("she is gone");
  step("none while one of the tabs is looked at");

  await device.open(b);
  await device.sees("she is gone");
  for (const tab of tabs) await tab.until(() => document.title === "Chat", "all is read on the other device");
  for (const until = Date.now() + 20_000; (await all()).length > 0; await first.page.waitForTimeout(50)) must(Date.now() < until, `what is read is still shown: ${(await all()).join(" | ")}`);
  step("what was read on another device is taken back");

  await device.write("from the other device");
  await bob.sees("from the other device");
  await device.page.evaluate(() => (location.hash = ""));
  await bob.write("an answer");
  await areTold("an answer");
  step("none of what was written on another device");

  await context.clearPermissions();
  await bob.write("without leave");
  for (const tab of tabs) await isUnread(2)(tab);
  await context.grantPermissions(["notifications"]);
  await bob.write("with leave");
  await areTold("with leave");
  step("none without leave");

  await worker.evaluate(async () => {
    const [notification] = await self.registration.getNotifications();
    const clicked = new NotificationEvent("notificationclick", { notification });
    // Nobody has to wait for what a test says.
    clicked.waitUntil = (showing) => showing;
    self.dispatchEvent(clicked);
  });
  const opened = () => Promise.all(tabs.map(({ page }) => page.evaluate((b) => document.querySelector(".conversation h1")?.textContent === b, b)));
  for (const until = Date.now() + 20_000; !(await opened()).includes(true); await first.page.waitForTimeout(50)) must(Date.now() < until, "the click opens nothing");
  must((await opened()).filter(Boolean).length === 1, "the click opens it in both tabs");
  must((await all()).length === 0, "the notification is still there");
  step("a click opens the conversation, in one tab");
});

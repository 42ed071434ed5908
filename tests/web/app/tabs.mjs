// Two tabs of one browser and a second device of alice are in step.
// node tabs.mjs /usr/bin/chromium http://127.0.0.1:8080/
import { must, nameOf, scenario, step } from "./stage.mjs";

await scenario(async (stage) => {
  const [a, b] = [nameOf("alice"), nameOf("bob")];
  const context = await stage.context();
  const first = await stage.page(context, "alice's first tab");
  await first.logIn(a);
  const second = await stage.page(context, "alice's second tab");
  await second.until(() => document.querySelector(".app") !== null, "logged in, as in the first tab");
  const device = await stage.person(a);
  device.name = "alice's other device";
  const bob = await stage.person(b);
  step("two tabs, another device, and bob");

  await first.open(b);
  await second.open(b);
  await device.open(b);
  await bob.open(a);
  await first.write("from the first tab");
  for (const one of [first, second, device, bob]) await one.sees("from the first tab");
  for (const one of [first, second, device]) await one.ticks("from the first tab", "read");
  step("what one sends is in the others, with its ticks");

  await device.write("from the device");
  await second.write("from the second tab");
  for (const one of [first, second, device]) {
    await one.sees("from the device");
    await one.sees("from the second tab");
    const texts = await one.texts();
    must(texts.length === 3, `${one.name} sees ${texts.length} messages in place of 3`);
  }
  step("and the other way round");

  await first.page.evaluate(() => (location.hash = ""));
  await second.page.evaluate(() => (location.hash = ""));
  await device.page.evaluate(() => (location.hash = ""));
  await bob.write("news");
  for (const one of [first, second, device]) await one.until(() => document.querySelector(".list .badge") !== null, "a badge");
  await device.open(b);
  await device.page.bringToFront();
  for (const one of [first, second, device]) await one.until(() => document.querySelector(".list .badge") === null, "the badge is gone");
  step("what one has read is read in the others");

  await first.open(b);
  await first.page.fill(".compose textarea", "a draft");
  await second.until(() => document.querySelector(".list-draft") !== null, "the draft in the list");
  await second.open(b);
  await second.until(() => document.querySelector(".compose textarea")?.value === "a draft", "the draft");
  await second.page.press(".compose textarea", "Enter");
  await first.until(() => document.querySelector(".compose textarea")?.value === "", "the draft is sent");
  step("drafts are shared by tabs");

  await first.choose("from the first tab", "Edit");
  await first.page.fill(".compose textarea", "from the first tab, but");
  await second.until(() => document.querySelector(".compose-editing") !== null && document.querySelector(".compose textarea").value === "from the first tab, but", "the words of the edit");
  await first.open(a.replace("alice", "zoe"));
  await first.until(() => document.querySelector(".compose-editing") === null, "nothing is edited in another conversation");
  await first.page.reload();
  await first.open(b);
  await first.until(() => document.querySelector(".compose-editing") !== null && document.querySelector(".compose textarea").value === "from the first tab, but", "the words of the edit after a reload");
  await first.page.press(".compose textarea", "Escape");
  for (const one of [first, second]) await one.until(() => document.querySelector(".compose-editing") === null && document.querySelector(".compose textarea").value === "", "it is edited no longer");
  step("the words of an edit survive a reload and another conversation, and are shared by tabs");

  await device.choose("from the device", "Edit");
  await device.page.fill(".compose textarea", "from the device, edited");
  await device.page.press(".compose textarea", "Enter");
  for (const one of [first, second, bob]) await one.sees("from the device, edited");
  await second.choose("from the first tab", "Delete for me");
  await second.page.locator(".dialog .button-danger").click();
  await device.page.reload();
  await device.sees("from the device, edited");
  await device.until(() => ![...document.querySelectorAll(".words")].some(({ textContent }) => textContent === "from the first tab"), "what was deleted elsewhere is gone");
  step("edits and deletions, too");

  await first.page.close();
  await second.write("the first tab is closed");
  await bob.sees("the first tab is closed");
  step("one tab goes, the other stays");
});

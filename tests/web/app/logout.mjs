// Whoever logs out in one tab has logged out in all of this browser, with a sentence, and nothing is left of what the others knew.
// node logout.mjs /usr/bin/chromium http://127.0.0.1:8080/ alice PASSWORD bob
import { more, must, scenario, step } from "./stage.mjs";

const [user, password, peer] = more;

await scenario(async (stage) => {
  const context = await stage.context();
  const first = await stage.page(context, "the first tab");
  await first.logIn(user, password);
  const second = await stage.page(context, "the second tab");
  await second.page.fill("input[name=username]", user);
  await second.page.getByRole("button", { name: "I have a password or token" }).click();
  await second.page.fill("input[name=password]", password);
  await second.page.getByRole("checkbox").check();
  await second.page.getByRole("button", { name: "Continue" }).click();
  await second.until(() => document.querySelector(".app") !== null, "logged in");
  const elsewhere = await stage.person(user, { password });
  elsewhere.name = "another browser";
  await second.open(peer);
  await second.write("a secret");
  await second.ticks("a secret", "stored");
  await second.choose("a secret", "Edit");
  await second.page.fill(".compose textarea", "a secret, with other words");
  step("two tabs, logged in with a password");

  await first.page.getByRole("button", { name: "Menu" }).click();
  await first.page.getByRole("menuitem", { name: "Log out" }).click();
  await first.page.locator(".dialog .button-danger").click();
  await second.until(() => document.querySelector("#login-told")?.textContent === "You have logged out in another tab.", "why it is logged out");
  must(!(await second.page.content()).includes("secret") && !second.page.url().includes(peer), "what was open is still to be seen");
  await second.page.reload();
  await second.until(() => document.querySelector("input[name=username]")?.value === "", "still logged out after a reload");
  must(await elsewhere.page.evaluate(() => document.querySelector(".app") !== null), "another browser is logged out, too");
  step("both are logged out, and other browsers are not");

  const left = () =>
    second.page.evaluate(async () => {
      const answer = (request) => new Promise((resolve, reject) => Object.assign(request, { onsuccess: () => resolve(request.result), onerror: reject }));
      const found = [...Object.entries(localStorage), ...Object.entries(sessionStorage)];
      for (const { name } of await indexedDB.databases()) {
        const database = await answer(indexedDB.open(name));
        for (const store of database.objectStoreNames) found.push(...(await answer(database.transaction(store).objectStore(store).getAll())));
        database.close();
      }
      return JSON.stringify(found);
    });
  must(!/secret|alice|bob/.test(await left()), `this is left: ${await left()}`);
  step("nothing is left");
});

// What a browser keeps of a user: nothing where it is told to keep nothing, and the chat works all the same; nothing after the user has logged out.
// node traces.mjs /usr/bin/chromium http://127.0.0.1:8080/
import { must, nameOf, scenario, step } from "./stage.mjs";

await scenario(async (stage) => {
  const [a, b] = [nameOf("alice"), nameOf("bob")];
  const strict = await stage.context();
  await strict.addInitScript(() => {
    const refuse = () => {
      throw new DOMException("Access is denied for this document.", "SecurityError");
    };
    Object.defineProperty(IDBFactory.prototype, "open", { value: refuse });
    for (const name of ["localStorage", "sessionStorage"]) Object.defineProperty(window, name, { get: refuse });
    // Nor has a page that is not secure any of these.
    for (const name of ["clipboard", "locks"]) Object.defineProperty(navigator, name, { get: () => undefined });
  });
  const alice = await stage.page(strict, a);
  await alice.logIn(a);
  await alice.open(b);
  await alice.write("from a browser that keeps nothing");
  await alice.ticks("from a browser that keeps nothing", "stored");
  await alice.choose("from a browser that keeps nothing", "Copy");
  await alice.until(() => document.querySelector(".notice")?.textContent.startsWith("Copied"), "it is copied");
  step("a browser that keeps nothing sends and copies");

  const bob = await stage.person(b);
  await bob.open(a);
  await bob.sees("from a browser that keeps nothing");
  await bob.write("an answer");
  await bob.ticks("an answer", "delivered");
  await bob.page.fill(".compose textarea", "a draft");
  const traces = () =>
    bob.page.evaluate(async () => {
      const answer = (request) => new Promise((resolve, reject) => Object.assign(request, { onsuccess: () => resolve(request.result), onerror: reject }));
      const found = [location.hash, ...Object.entries(localStorage), ...Object.entries(sessionStorage)];
      for (const { name } of await indexedDB.databases()) {
        const database = await answer(indexedDB.open(name));
        for (const store of database.objectStoreNames) found.push(...(await answer(database.transaction(store).objectStore(store).getAll())));
        database.close();
      }
      return JSON.stringify(found);
    });
  must((await traces()).includes("a draft"), "a draft is not kept");
  await bob.page.getByRole("button", { name: "Menu" }).click();
  await bob.page.getByRole("menuitem", { name: "Log out" }).click();
  await bob.page.locator(".dialog .button-danger").click();
  await bob.until(() => document.querySelector(".login") !== null, "it is logged out");
  let left = await traces();
  for (const until = Date.now() + 5_000; Date.now() < until && /alice|bob|answer|draft/.test(left); left = await traces());
  must(!/alice|bob|answer|draft|nothing/.test(left), `this is left: ${left}`);
  step("who logs out leaves nothing");

  const page = await (await stage.context()).newPage();
  await page.goto(new URL(`/embed.html#user=${b}&with=${a}`, bob.page.url()).href);
  await page.locator(".words", { hasText: "an answer" }).waitFor();
  must(!page.url().includes(b), "the name stays in the address");
  must(!(await page.evaluate(() => JSON.stringify([Object.entries(localStorage), Object.entries(sessionStorage)]))).includes(b), "the frame remembers who was there");
  step("a frame remembers nobody");
});

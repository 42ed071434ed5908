// The connection is cut: a banner, what is written waits, a reload works without the server, and afterwards everything is there once.
// node offline.mjs /usr/bin/chromium http://127.0.0.1:8080/
import { must, nameOf, scenario, step } from "./stage.mjs";

await scenario(async (stage) => {
  const wire = await stage.wire();
  const [a, b] = [nameOf("alice"), nameOf("bob")];
  const alice = await stage.person(a, { url: wire.url });
  const bob = await stage.person(b);
  await alice.open(b);
  await bob.open(a);
  await alice.write("before");
  await bob.sees("before");
  await bob.write("before, too");
  await alice.ticks("before", "read");
  await alice.sees("before, too");
  await alice.page.evaluate(() => navigator.serviceWorker.ready.then(({ active }) => active && undefined));
  await alice.until(() => navigator.serviceWorker.controller !== null, "the service worker has the page");
  step("alice and bob talk");

  wire.cut();
  await alice.lost();
  for (const text of ["one", "two", "three"]) await alice.write(text);
  await alice.ticks("three", "waiting to be sent");
  await bob.write("are you there?");
  step("the connection is cut: a banner, and what alice writes waits");

  await alice.page.reload();
  await alice.sees("before, too");
  await alice.sees("two");
  await alice.ticks("three", "waiting to be sent");
  await alice.write("four");
  await alice.ticks("four", "waiting to be sent");
  step("a reload without the server shows what is kept and what waits");

  wire.mend();
  await alice.page.evaluate(() => dispatchEvent(new Event("online")));
  await alice.connected();
  await alice.ticks("four", "read");
  await alice.sees("are you there?");
  await bob.sees("four");
  step("the connection is back: sent, and received");

  for (const one of [alice, bob]) {
    const texts = await one.texts();
    for (const text of ["before", "before, too", "one", "two", "three", "four", "are you there?"]) {
      const times = texts.filter((other) => other === text).length;
      must(times === 1, `${one.name} sees “${text}” ${times} times`);
    }
    const order = texts.filter((text) => ["one", "two", "three", "four"].includes(text)).join(" ");
    must(order === "one two three four", `${one.name} sees them in the order ${order}`);
  }
  step("nothing is lost or doubled, and all is in order");

  for (let round = 0; round < 5; round += 1) {
    for (let at = 0; at < 5; at += 1) await alice.write(`round ${round}, ${at}`);
    wire.cut();
    await alice.lost();
    await bob.write(`bob in round ${round}`);
    wire.mend();
    await alice.page.getByRole("button", { name: "Try now" }).click({ timeout: 5_000 }).catch(() => {});
    await alice.connected();
    await alice.ticks(`round ${round}, 4`, "read");
    await alice.sees(`bob in round ${round}`);
  }
  for (const one of [alice, bob]) {
    const texts = (await one.texts()).filter((text) => /round \d/.test(text));
    must(new Set(texts).size === texts.length, `${one.name} sees something twice: ${texts.join(" | ")}`);
    must(texts.length === 30, `${one.name} sees ${texts.length} of 30 messages: ${texts.join(" | ")}`);
  }
  step("cut off five times while writing: each message once");
});

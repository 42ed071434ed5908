// The server is killed and comes back while both write: nothing is lost or doubled. Whoever runs this does the killing: for each line `kill the server` on standard output
// it is to be killed, and a line to be written to standard input when it is gone; for each `start the server` the same when it is back, at the same address.
// node restart.mjs /usr/bin/chromium http://127.0.0.1:8080/ [ROUNDS]
import { ask, more, must, nameOf, scenario, step } from "./stage.mjs";

const rounds = Number(more[0] ?? 3);

await scenario(async (stage) => {
  const [a, b] = [nameOf("alice"), nameOf("bob")];
  const alice = await stage.person(a);
  const bob = await stage.person(b);
  await alice.open(b);
  await bob.open(a);
  const said = [];
  const say = async (one, text) => {
    said.push(text);
    await one.write(text);
  };
  await say(alice, "begin");
  await bob.sees("begin");

  for (let round = 1; round <= rounds; round += 1) {
    for (let at = 1; at <= 5; at += 1) {
      await say(alice, `alice ${round}.${at}`);
      await say(bob, `bob ${round}.${at}`);
    }
    await ask("kill the server");
    await Promise.all([alice.lost(), bob.lost()]);
    await say(alice, `alice ${round}, without a server`);
    await say(bob, `bob ${round}, without a server`);
    if (round % 2 === 1) await alice.page.reload();
    await alice.sees(`alice ${round}, without a server`);
    await ask("start the server");
    for (const one of [alice, bob]) await one.page.getByRole("button", { name: "Try now" }).click({ timeout: 2_000 }).catch(() => {});
    await alice.ticks(`alice ${round}, without a server`, "read");
    await bob.ticks(`bob ${round}, without a server`, "read");
    for (const one of [alice, bob]) await one.sees(one === alice ? `bob ${round}, without a server` : `alice ${round}, without a server`);
    step(`round ${round}: both are back`);
  }

  for (const one of [alice, bob]) {
    const texts = await one.texts();
    for (const text of said.slice(-24)) {
      const times = texts.filter((other) => other === text).length;
      must(times === 1, `${one.name} sees “${text}” ${times} times`);
    }
  }
  const [hers, his] = [await alice.texts(), await bob.texts()].map((texts) => texts.slice(-20).join(" | "));
  must(hers === his, `they see another order: ${hers} and ${his}`);
  step("nothing is lost or doubled, and both see the same order");
});

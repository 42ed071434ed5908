// The server is put back to an older day while alice's page is open: what was lost is gone from it, and nothing that came since counts as read. Whoever runs this does
// it: for the lines `make a backup` and `put the backup back` on standard output a line is to be written to standard input when it is done, with the server at the
// same address.
// node restored.mjs /usr/bin/chromium http://127.0.0.1:8080/
import { ask, must, nameOf, scenario, step } from "./stage.mjs";


await scenario(async (stage) => {
  const [a, b] = [nameOf("alice"), nameOf("bob")];
  const wire = await stage.wire();
  const alice = await stage.person(a, { url: wire.url });
  const bob = await stage.person(b);
  await alice.open(b);
  await bob.open(a);
  await bob.write("kept");
  await alice.sees("kept");
  await ask("make a backup");
  for (let at = 1; at <= 3; at += 1) await bob.write(`lost ${at}`);
  await alice.sees("lost 3");
  await bob.ticks("lost 3", "read");

  wire.cut();
  await alice.lost();
  await bob.page.close();
  stage.people.pop();
  await ask("put the backup back");
  const other = await stage.person(b);
  await other.open(a);
  for (let at = 1; at <= 4; at += 1) await other.write(`new ${at}`);
  await other.ticks("new 4", "stored");
  await alice.page.evaluate(() => (document.hasFocus = () => false));
  wire.mend();
  await alice.page.getByRole("button", { name: "Try now" }).click({ timeout: 2_000 }).catch(() => {});
  const all = ["kept", "new 1", "new 2", "new 3", "new 4"].join();
  await alice.until((all) => [...document.querySelectorAll(".message .words")].map(({ textContent }) => textContent).join() === all, all, all);
  step("what was lost is gone, and what is new is there");
  await other.ticks("new 4", "delivered");
  await other.write("new 5");
  await alice.sees("new 5");
  await other.ticks("new 5", "delivered");
  must((await other.page.locator(".tick-read").count()) === 0, "alice has read what nobody has shown her");
  step("nothing is read that nobody has seen");

  await alice.page.evaluate(() => {
    document.hasFocus = () => true;
    dispatchEvent(new Event("focus"));
  });
  await other.ticks("new 5", "read");
  step("whoever comes back to the window has read it");
});

// Somebody at a page who does what the lines on standard input say, and answers each with `done`: `open PEER`, `write TEXT`, `sees TEXT`, `ticks TICK TEXT`.
// node hands.mjs /usr/bin/chromium http://127.0.0.1:8080/ bob
import { createInterface } from "node:readline";

import { more, must, scenario, step } from "./stage.mjs";

await scenario(async (stage) => {
  const person = await stage.person(more[0]);
  step("done");
  for await (const line of createInterface({ input: process.stdin })) {
    const [, verb, rest] = /^(\w+) (.*)$/.exec(line) ?? [];
    const [, tick, text] = /^(\w+) (.*)$/.exec(rest ?? "") ?? [];
    if (verb === "open") await person.open(rest);
    else if (verb === "write") await person.write(rest);
    else if (verb === "sees") await person.sees(rest);
    else if (verb === "ticks") await person.ticks(text, tick);
    else must(line === "/quit", `what is ${line}?`);
    if (line === "/quit") break;
    step("done");
  }
});

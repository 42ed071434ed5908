// What the web chat weighs, gzipped, as it is in dist; ends with code 1 if it is more than it may be. npm run build && npm run budget
import { readFileSync, readdirSync } from "node:fs";
import { gzipSync } from "node:zlib";

const KB = 1_000;
const SCRIPTS_MAX = 150 * KB;
const FIRST_PAINT_MAX = 40 * KB;

const dist = new URL("dist/", import.meta.url);
const read = (name) => readFileSync(new URL(name, dist));
const weightOf = (name) => gzipSync(read(name), { level: 9 }).length;
const shown = (bytes) => `${(bytes / KB).toFixed(1).padStart(7)} KB`;

const assets = readdirSync(new URL("assets/", dist)).map((name) => `assets/${name}`);
const scripts = [...assets.filter((name) => name.endsWith(".js")), "sw.js"];

/** What the page has before anything is loaded on demand: what it names, and what those import at once. */
const first = new Set(["index.html"]);
for (const name of first) {
  const source = read(name).toString();
  const named = name.endsWith(".html") ? source.matchAll(/(?:src|href)="\/(assets\/[^"]+)"/g) : source.matchAll(/(?:^|[;}\s])import\s*(?:[^"'();]*?from\s*)?["']\.\/([^"']+)["']/g);
  for (const [, other] of named) first.add(other.startsWith("assets/") ? other : `assets/${other}`);
}

const sum = (names) => [...names].reduce((all, name) => all + weightOf(name), 0);
const budgets = [
  ["first paint", first, FIRST_PAINT_MAX],
  ["all JavaScript", scripts, SCRIPTS_MAX],
];
let isOver = false;
for (const [what, names, max] of budgets) {
  const weight = sum(names);
  for (const name of names) console.log(`${shown(weightOf(name))}  ${name}`);
  console.log(`${shown(weight)}  ${what}, of at most${shown(max)}\n`);
  if (weight > max) {
    console.error(`${what} is ${weight - max} bytes too heavy`);
    isOver = true;
  }
}
if (![...first].some((name) => name.endsWith(".js")) || [...first].some((name) => /mqtt|wire/.test(name))) {
  console.error(`the first paint is not what it has to be: ${[...first].join(", ")}`);
  isOver = true;
}
process.exitCode = isOver ? 1 : 0;

// Runs one client's program: node checks.mjs PROGRAM PACKAGE RESULTS. What checks.py does, for programs in JavaScript:
// a program exports `checks`, functions by what they show.
import { appendFileSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const SECONDS = 240; // for one check
const [program, client, results] = process.argv.slice(2);
const tell = (line) => appendFileSync(results, JSON.stringify(line) + "\n");

writeFileSync(results, "");
tell({ version: JSON.parse(readFileSync(join("node_modules", client, "package.json"))).version });
const { checks } = await import(program);
for (const [what, check] of Object.entries(checks)) {
  const begin = Date.now();
  let problem = null;
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`not done after ${SECONDS} seconds`)), SECONDS * 1000);
  });
  try {
    await Promise.race([check(), late]);
  } catch (error) {
    console.error(error);
    problem = `${error.constructor.name}: ${String(error.message).slice(0, 400)}`;
  } finally {
    clearTimeout(timer);
  }
  tell({ what, problem, seconds: Math.round((Date.now() - begin) / 10) / 100 });
}
tell({ ended: true });
process.exit(0); // connections that are kept alive would keep the process

/**
 * The page's engine in node, for scripts and tests: continues a prompt and prints one line of JSON.
 *
 *   node generate.mjs FOLDER --dtype q4 --prompt "Once upon a time" --max-tokens 32
 *   node generate.mjs FOLDER --dtype q4 --chat "Tell me a story."
 */
import { readFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";
import * as lib from "@huggingface/transformers";
import { DTYPES, generate, load } from "./public/engine.js";
import { explain } from "./public/errors.js";

const USAGE =
  "usage: node generate.mjs FOLDER (--prompt TEXT | --chat TEXT) [--dtype q4] [--max-tokens 64] [--temperature 0]";

const { values, positionals } = parseArgs({
  options: {
    dtype: { type: "string", default: "q4" },
    prompt: { type: "string" },
    chat: { type: "string" },
    "max-tokens": { type: "string", default: "64" },
    temperature: { type: "string", default: "0" },
  },
  allowPositionals: true,
});
if (positionals.length !== 1 || (values.prompt === undefined) === (values.chat === undefined)) {
  console.error(USAGE);
  process.exit(2);
}
if (!Object.hasOwn(DTYPES, values.dtype)) {
  console.error(`dtype "${values.dtype}" is not one of ${Object.keys(DTYPES).join(", ")}`);
  process.exit(2);
}

// An absolute path is never mistaken for the name of a model on a hub.
const folder = resolve(positionals[0]);
lib.env.allowRemoteModels = false;
lib.env.useFSCache = false;

/** A text file of the folder, or null. @param {string} name */
const readText = (name) => readFile(join(folder, name), "utf8").catch(() => null);

async function run() {
  const started = performance.now();
  const engine = await load(lib, folder, { dtype: values.dtype, device: "cpu", readText });
  const loadMs = performance.now() - started;
  const prompt = values.prompt ?? [{ role: "user", content: values.chat }];
  const reply = await generate(engine, prompt, {
    maxTokens: Number(values["max-tokens"]),
    temperature: Number(values.temperature),
  });
  console.log(JSON.stringify({ dtype: values.dtype, loadMs, ...reply }));
}

try {
  await run();
} catch (error) {
  console.error(explain(error));
  process.exit(1);
}

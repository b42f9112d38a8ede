/**
 * Uses the example's page as a person would, in Debian's Chromium, and prints what it saw as one line of JSON.
 *
 *   node drive_page.mjs CHROMIUM URL '{"dtype": "q4", "mode": "text", "prompts": ["Once"], "tokens": 24}'
 *
 * Optional: "screenshot" (a path), "scheme" ("dark"), "stopAfter" (press Stop once so many characters are there).
 */
import { mkdtemp, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

const require = createRequire(new URL("../../examples/browser/package.json", import.meta.url));
const { chromium } = require("playwright-core");

const [executablePath, url, job] = process.argv.slice(2);
const { dtype, mode, prompts, tokens, screenshot, scheme = "light", stopAfter } = JSON.parse(job);

const profile = await mkdtemp(join(tmpdir(), "smolexport-chromium-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath,
  headless: true,
  colorScheme: scheme,
  viewport: { width: 900, height: 760 },
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});

async function use() {
  const page = await context.newPage();
  const hosts = new Set();
  const complaints = [];
  context.on("request", (request) => request.url().startsWith("blob:") || hosts.add(new URL(request.url()).host));
  page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  await page.goto(url);
  const state = (name) => page.waitForSelector(`body[data-state=${name}]`, { timeout: 120_000 });
  await state("idle");
  const offered = await page.locator("#dtype option").evaluateAll((options) => options.map((option) => option.value));
  await page.selectOption("#dtype", dtype);
  await page.click("#load");
  await page.waitForSelector("body[data-state=ready], .turn.error", { timeout: 120_000 });
  const status = await page.textContent("#status");
  const isolated = await page.evaluate(() => self.crossOriginIsolated);
  if (await page.locator(".turn.error").count()) prompts.length = 0;
  else if (mode) await page.selectOption("#mode", mode);
  await page.fill("#tokens", String(tokens));
  for (const prompt of prompts) {
    await page.fill("#prompt", prompt);
    await page.press("#prompt", "Enter");
    if (stopAfter) {
      const written = (least) => document.querySelector(".turn:last-child .own")?.textContent.length > least;
      await page.waitForFunction(written, stopAfter);
      await page.click("#stop");
    }
    await state("ready");
  }
  if (screenshot) await page.screenshot({ path: screenshot });
  const turns = await page.locator(".turn").evaluateAll((all) =>
    all.map((turn) => ({
      kind: turn.className.replace("turn ", ""),
      text: turn.querySelector(".own").textContent,
      note: turn.querySelector(".note")?.textContent ?? null,
    })),
  );
  return { offered, status, isolated, turns, hosts: [...hosts], complaints };
}

try {
  console.log(JSON.stringify(await use()));
} finally {
  await context.close();
  await rm(profile, { recursive: true, force: true });
}

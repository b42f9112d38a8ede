/** The page: its controls, what they send to the worker, and what they show of its answers. */
import { conversation } from "./conversation.js";
import { explain } from "./errors.js";
import { describe } from "./folder.js";

/** Every element with an id, by that id. */
const ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const view = conversation(ui.turns);

const MB = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

/** What happens now decides what can be pressed: "idle" | "loading" | "ready" | "replying". */
let state = "idle";
let worker = null;
let graphs = [];
/** The messages of the chat so far. @type {{ role: string, content: string }[]} */
let messages = [];
/** The reply being written. */
let open = null;

function become(next) {
  state = next;
  const free = state === "ready";
  ui.load.disabled = ui.dtype.disabled = ui.device.disabled = state === "loading" || state === "replying";
  ui.send.disabled = ui.prompt.disabled = !free;
  ui.mode.disabled = !free;
  ui.send.hidden = state === "replying";
  ui.stop.hidden = state !== "replying";
  ui.progress.hidden = state !== "loading";
  document.body.dataset.state = state;
}

function fail(message) {
  ui.status.textContent = "";
  view.add("error", message);
}

const answers = {
  progress({ loaded }) {
    // The runtime itself is fetched too: what is left after the weights is not counted.
    ui.progress.value = Math.min(loaded, ui.progress.max);
    ui.status.textContent = `Loading: ${MB(loaded)}`;
  },
  ready({ ms, chat, context, threads }) {
    const wasm = `WebAssembly, ${threads} ${threads === 1 ? "thread" : "threads"}`;
    const where = ui.device.value === "webgpu" ? "WebGPU" : wasm;
    ui.status.textContent = `Ready in ${(ms / 1000).toFixed(1)} s: ${ui.dtype.value} on ${where}, context ${context}`;
    ui.mode.querySelector("[value=chat]").disabled = !chat;
    ui.mode.value = chat ? "chat" : "text";
    become("ready");
    ui.prompt.focus();
  },
  piece({ text }) {
    open.append(text);
  },
  done({ reply }) {
    // The whole is decoded at once and may differ from its pieces where a character spans tokens.
    open.set(reply.text);
    open.note(summary(reply));
    open.busy(false);
    if (ui.mode.value === "chat") messages.push({ role: "assistant", content: reply.text });
    ui.status.textContent = summary(reply);
    become("ready");
    ui.prompt.focus();
  },
  error({ during, message }) {
    open?.busy(false);
    // A question without an answer would leave the chat with two questions in a row.
    if (during === "generate" && messages.at(-1)?.role === "user") messages.pop();
    fail(message);
    become(during === "load" ? "idle" : "ready");
  },
};

function summary({ tokens, rate, firstMs, reason }) {
  const parts = [`${tokens.length} ${tokens.length === 1 ? "token" : "tokens"}`];
  if (rate !== null) parts.push(`${rate.toFixed(1)} tokens/s`);
  parts.push(`first after ${firstMs.toFixed(0)} ms`);
  if (reason === "length") parts.push("cut at the limit");
  if (reason === "interrupted") parts.push("stopped");
  return parts.join(" · ");
}

function loadModel() {
  // A new worker each time: the memory of the model before is given back whole.
  worker?.terminate();
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.addEventListener("message", ({ data }) => answers[data.type](data));
  worker.addEventListener("error", (event) => {
    event.preventDefault();
    fail(`The worker did not start: ${event.message || "see the browser's console"}`);
    become("idle");
  });
  const graph = graphs.find(({ dtype }) => dtype === ui.dtype.value);
  ui.progress.max = graph.bytes;
  ui.progress.value = 0;
  ui.status.textContent = "Loading";
  become("loading");
  worker.postMessage({ type: "load", dtype: ui.dtype.value, device: ui.device.value });
}

function send() {
  const text = ui.prompt.value;
  if (state !== "ready" || text.trim() === "") return;
  const chat = ui.mode.value === "chat";
  if (chat) {
    messages.push({ role: "user", content: text.trim() });
    view.add("user", text.trim());
  }
  open = chat ? view.add("assistant") : view.add("text", "", text);
  open.busy(true);
  ui.prompt.value = "";
  ui.status.textContent = "Writing";
  become("replying");
  worker.postMessage({
    type: "generate",
    prompt: chat ? messages : text,
    maxTokens: ui.tokens.valueAsNumber || 128,
    temperature: ui.temperature.valueAsNumber || 0,
  });
}

function startOver() {
  if (state === "replying") return;
  messages = [];
  view.clear();
  ui.prompt.focus();
}

async function offerDevices() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (!adapter) ui.device.querySelector("[value=webgpu]").remove();
}

async function start() {
  become("loading");
  ui.progress.hidden = true;
  try {
    const [folder] = await Promise.all([describe(), offerDevices()]);
    graphs = folder.graphs;
    ui.name.textContent = folder.name;
    const option = ({ dtype, label, bytes }) => new Option(`${dtype}: ${label}, ${MB(bytes)}`, dtype);
    ui.dtype.replaceChildren(...graphs.map(option));
    // A link may name the weights: ?dtype=int8
    const asked = new URLSearchParams(location.search).get("dtype");
    const known = graphs.some(({ dtype }) => dtype === asked);
    ui.dtype.value = known ? asked : (folder.preferred ?? graphs[0].dtype);
    const slow = self.crossOriginIsolated ? "" : " This server sends no isolation headers: one thread only.";
    ui.status.textContent = `Choose the weights and load them.${slow}`;
    become("idle");
    ui.load.focus();
  } catch (error) {
    fail(explain(error));
  }
}

ui.setup.addEventListener("submit", (event) => {
  event.preventDefault();
  loadModel();
});
ui.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
ui.prompt.addEventListener("keydown", (event) => {
  // Enter sends, Shift+Enter breaks the line; an Enter that ends an input method's word does neither.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
ui.stop.addEventListener("click", () => worker.postMessage({ type: "stop" }));
ui.clear.addEventListener("click", startOver);
await start();

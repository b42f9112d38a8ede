/**
 * The model lives here, off the page's thread, so that the page stays responsive while tokens are made.
 *
 * Takes  { type: "load", dtype, device } · { type: "generate", prompt, maxTokens, temperature } · { type: "stop" }
 * Posts  { type: "progress", loaded } · { type: "ready", ms, chat, context, threads } · { type: "piece", text }
 *        { type: "done", reply } · { type: "error", during, message }
 */
import * as lib from "./vendor/transformers.min.js";
import { generate, load } from "./engine.js";
import { explain } from "./errors.js";
import { MODEL, readText } from "./folder.js";

const { env } = lib;
env.allowRemoteModels = false;
env.allowLocalModels = true;
// A browser cache would go on serving the weights of an earlier export.
env.useBrowserCache = false;
env.useWasmCache = false;

let engine = null;
const stop = new lib.InterruptableStoppingCriteria();

/** Count the bytes of everything fetched. */
function countBytes() {
  let loaded = 0;
  let told = 0;
  env.fetch = async (input, init) => {
    const response = await fetch(input, init);
    if (!response.ok || response.body === null) return response;
    const counter = new TransformStream({
      transform(chunk, controller) {
        loaded += chunk.length;
        if (loaded - told > 250_000) postMessage({ type: "progress", loaded: (told = loaded) });
        controller.enqueue(chunk);
      },
    });
    return new Response(response.body.pipeThrough(counter), { status: response.status, headers: response.headers });
  };
}

/** The runtime's own files, from this server: the plain build, or the larger one that also holds WebGPU. */
function placeRuntime(device) {
  const build = device === "webgpu" ? ".asyncify" : "";
  const url = (suffix) => new URL(`vendor/ort-wasm-simd-threaded${build}.${suffix}`, import.meta.url).href;
  env.backends.onnx.wasm.wasmPaths = { mjs: url("mjs"), wasm: url("wasm") };
}

/** Let waiting messages in before each step: without this, "stop" would be read when all tokens are made. */
function listenBetweenTokens(model) {
  const forward = model.forward.bind(model);
  const { port1, port2 } = new MessageChannel();
  model.forward = async (inputs) => {
    await new Promise((resolve) => {
      port1.onmessage = resolve;
      port2.postMessage(null);
    });
    return forward(inputs);
  };
}

const jobs = {
  async load({ dtype, device }) {
    placeRuntime(device);
    countBytes();
    env.localModelPath = new URL("..", MODEL).pathname;
    const started = performance.now();
    engine = await load(lib, "model", { dtype, device, readText });
    listenBetweenTokens(engine.model);
    postMessage({
      type: "ready",
      ms: performance.now() - started,
      chat: engine.template !== null,
      context: engine.context,
      threads: env.backends.onnx.wasm.numThreads,
    });
  },
  async generate({ prompt, maxTokens, temperature }) {
    stop.reset();
    const onPiece = (text) => postMessage({ type: "piece", text });
    postMessage({ type: "done", reply: await generate(engine, prompt, { maxTokens, temperature, onPiece, stop }) });
  },
  async stop() {
    stop.interrupt();
  },
};

function fail(during, error) {
  console.error(error);
  postMessage({ type: "error", during, message: explain(error) });
}

addEventListener("message", async ({ data }) => {
  try {
    await jobs[data.type](data);
  } catch (error) {
    fail(data.type, error);
  }
});
// Transformers.js never settles the load of a model whose external data is missing: its error surfaces only here.
addEventListener("unhandledrejection", (event) => {
  event.preventDefault();
  fail("load", event.reason);
});

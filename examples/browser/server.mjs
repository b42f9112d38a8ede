/**
 * A static server for the page: `node server.mjs FOLDER [--port 8080]`.
 *
 * Three places, and nothing else, can be read through it:
 *   /          the page's own files, public/
 *   /vendor/   the few files of node_modules that the page needs, listed below
 *   /model/    the exported folder
 * It listens on the loopback interface only.
 */
import { createReadStream } from "node:fs";
import { realpath, stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, sep } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const HERE = fileURLToPath(new URL(".", import.meta.url));

const VENDOR = new Map(Object.entries({
  "transformers.min.js": "@huggingface/transformers/dist/transformers.min.js",
  "ort-wasm-simd-threaded.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
  "ort-wasm-simd-threaded.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
  "ort-wasm-simd-threaded.asyncify.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs",
  "ort-wasm-simd-threaded.asyncify.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
}));

const TYPES = {
  ".css": "text/css; charset=utf-8",
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".json": "application/json; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
  ".svg": "image/svg+xml",
  ".wasm": "application/wasm",
};

const HEADERS = {
  // These two make the page cross-origin isolated, without which WebAssembly has one thread.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
  // The browser itself refuses whatever would come from another host.
  "Content-Security-Policy":
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; connect-src 'self'; " +
    "style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  "X-Content-Type-Options": "nosniff",
  // A folder exported again must not be answered from a cache.
  "Cache-Control": "no-cache",
};

/** The place that a request's path is in, and the name in it. @param {string} path @param {string} folder */
function place(path, folder) {
  if (path.startsWith("/vendor/")) return [join(HERE, "node_modules"), VENDOR.get(path.slice("/vendor/".length))];
  if (path.startsWith("/model/")) return [folder, path.slice("/model/".length)];
  return [join(HERE, "public"), path === "/" ? "index.html" : path];
}

/** The file behind a request's path, or null: missing, no file, or outside of its place after links are followed. */
async function find(path, folder) {
  try {
    const [root, name] = place(decodeURIComponent(path), folder);
    if (name === undefined) return null;
    const file = await realpath(join(root, name));
    const about = await stat(file);
    const inside = file.startsWith((await realpath(root)) + sep);
    return inside && about.isFile() ? { file, size: about.size } : null;
  } catch {
    return null; // no such file, or a path that is none
  }
}

/** A server for `folder`, not yet listening. @param {string} folder */
export function serve(folder) {
  return createServer(async (request, response) => {
    if (request.method !== "GET" && request.method !== "HEAD") {
      response.writeHead(405, { ...HEADERS, Allow: "GET, HEAD" }).end();
      return;
    }
    const found = await find((request.url ?? "/").split(/[?#]/, 1)[0], folder);
    if (found === null) {
      response.writeHead(404, { ...HEADERS, "Content-Type": "text/plain" }).end("not found\n");
      return;
    }
    const type = TYPES[extname(found.file)] ?? "application/octet-stream";
    response.writeHead(200, { ...HEADERS, "Content-Type": type, "Content-Length": found.size });
    if (request.method === "HEAD") response.end();
    else createReadStream(found.file).on("error", () => response.destroy()).pipe(response);
  });
}

/** What the folder lacks to be served, or null. @param {string} folder */
async function missing(folder) {
  for (const name of ["config.json", "tokenizer.json", "onnx"]) {
    try {
      await stat(join(folder, name));
    } catch {
      return `${folder}: no ${name}; give a folder that "smolexport onnx" wrote`;
    }
  }
  try {
    await stat(join(HERE, "node_modules", VENDOR.get("transformers.min.js")));
  } catch {
    return `${HERE}node_modules: Transformers.js is not installed; run "npm ci" in ${HERE}`;
  }
  return null;
}

async function main() {
  const options = { port: { type: "string", default: "8080" } };
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  if (positionals.length !== 1) {
    console.error("usage: node server.mjs FOLDER [--port 8080]");
    process.exit(2);
  }
  const reason = await missing(positionals[0]);
  if (reason !== null) {
    console.error(reason);
    process.exit(2);
  }
  const server = serve(positionals[0]);
  server.on("error", (error) => {
    const taken = `port ${values.port} is taken; give another with --port`;
    console.error(error.code === "EADDRINUSE" ? taken : String(error));
    process.exit(1);
  });
  // Port 0 takes a free one; the line printed is what a script reads.
  server.listen(Number(values.port), "127.0.0.1", () => console.log(`http://localhost:${server.address().port}/`));
}

if (process.argv[1] !== undefined && (await realpath(process.argv[1])) === fileURLToPath(import.meta.url)) await main();

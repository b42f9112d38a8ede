/**
 * A static server for the page: `node server.mjs FOLDER [--port 8080]`.
 *
 * Three places, and nothing else, can be read through it:
 *   /          the page's own files, public/
 *   /vendor/   the few files of node_modules that the page needs, listed below
 *   /model/    the exported folder
 * It listens on the loopback interface only, and answers only requests that name it: a page of another host, whose name
 * was made to mean this machine, gets nothing.
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
  ".mjs": "text/javascript; charset=utf-8",
  ".svg": "image/svg+xml",
  ".wasm": "application/wasm",
};

// A model's folder is a stranger's: nothing of it is ever a page, a picture or a script of this address.
const MODEL_TYPES = {
  ".jinja": "text/plain; charset=utf-8",
  ".json": "application/json; charset=utf-8",
  ".md": "text/plain; charset=utf-8",
  ".txt": "text/plain; charset=utf-8",
};

const HEADERS = {
  // These two make the page cross-origin isolated, without which WebAssembly has one thread.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
  "X-Content-Type-Options": "nosniff",
  // A folder exported again must not be answered from a cache.
  "Cache-Control": "no-cache",
};

// The browser itself refuses whatever would come from another host. A worker's rules come with its own script; only
// workers compile WebAssembly.
const SHUT = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const OWN = `${SHUT}; worker-src 'self'; connect-src 'self'`;
const PAGE_POLICY = `${OWN}; script-src 'self'; style-src 'self'; img-src 'self'`;
const SCRIPT_POLICY = `${OWN}; script-src 'self' 'wasm-unsafe-eval'`;
const FILE_POLICY = `${SHUT}; sandbox`;

/** The rules for a file of this media type. @param {string} type */
function policy(type) {
  if (type.startsWith("text/html")) return PAGE_POLICY;
  return type.startsWith("text/javascript") ? SCRIPT_POLICY : FILE_POLICY;
}

/** The place that a request's path is in, the name in it, and the media types of that place. */
function place(path, folder) {
  if (path.startsWith("/model/")) return [folder, path.slice("/model/".length), MODEL_TYPES];
  const packages = join(HERE, "node_modules");
  if (path.startsWith("/vendor/")) return [packages, VENDOR.get(path.slice("/vendor/".length)), TYPES];
  return [join(HERE, "public"), path === "/" ? "index.html" : path, TYPES];
}

/** The file behind a request's path, or null: missing, no file, or outside of its place after links are followed. */
async function find(path, folder) {
  try {
    const [root, name, types] = place(decodeURIComponent(path), folder);
    if (name === undefined) return null;
    const file = await realpath(join(root, name));
    const about = await stat(file);
    const inside = file.startsWith((await realpath(root)) + sep);
    const type = types[extname(file).toLowerCase()] ?? "application/octet-stream";
    return inside && about.isFile() ? { file, size: about.size, type } : null;
  } catch {
    return null; // no such file, or a path that is none
  }
}

/** Whether a request names the address that it came to. @param {import("node:http").IncomingMessage} request */
function addressed({ headers, socket }) {
  const names = ["localhost", "127.0.0.1", "[::1]"];
  const ports = socket.localPort === 80 ? ["", ":80"] : [`:${socket.localPort}`];
  return names.some((name) => ports.some((port) => headers.host?.toLowerCase() === name + port));
}

/** A refusal with one line of text. */
function refuse(response, code, line, headers = {}) {
  const about = { "Content-Type": "text/plain; charset=utf-8", "Content-Length": line.length + 1 };
  response.writeHead(code, { ...HEADERS, "Content-Security-Policy": FILE_POLICY, ...about, ...headers });
  response.end(`${line}\n`);
}

/** A server for `folder`, not yet listening. @param {string} folder */
export function serve(folder) {
  return createServer(async (request, response) => {
    if (!addressed(request)) return refuse(response, 421, "this server answers to localhost only");
    if (request.method !== "GET" && request.method !== "HEAD") {
      return refuse(response, 405, "this server only reads", { Allow: "GET, HEAD" });
    }
    const found = await find((request.url ?? "/").split(/[?#]/, 1)[0], folder);
    if (found === null) return refuse(response, 404, "not found");
    response.writeHead(200, {
      ...HEADERS,
      "Content-Security-Policy": policy(found.type),
      "Content-Type": found.type,
      "Content-Length": found.size,
    });
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

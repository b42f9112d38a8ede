/** What the served folder holds, read from the files themselves, so that any static server will do. */
import { DTYPES } from "./engine.js";

/** Where the folder is served: beside the page. */
export const MODEL = new URL("model/", import.meta.url);

/** A text file of the folder, or null where it is not there. @param {string} name */
export async function readText(name) {
  const response = await fetch(new URL(name, MODEL));
  return response.ok ? response.text() : null;
}

/** Bytes of a file of the folder, or null where it is not there. @param {string} name */
async function size(name) {
  const response = await fetch(new URL(name, MODEL), { method: "HEAD" });
  return response.ok ? Number(response.headers.get("Content-Length") ?? 0) : null;
}

/**
 * The graphs that can be chosen.
 *
 * @typedef {{ dtype: string, label: string, bytes: number }} Graph
 * @returns {Promise<{ name: string, graphs: Graph[], preferred: string | null }>}
 *   preferred: the dtype that the folder's own configuration names
 */
export async function describe() {
  const text = await readText("config.json");
  if (text === null) throw new Error("The server has no model folder: start it with node server.mjs FOLDER.");
  const config = JSON.parse(text);
  const own = config["transformers.js_config"] ?? {};
  const listed = own.use_external_data_format;
  const graphs = [];
  for (const [dtype, { file, label }] of Object.entries(DTYPES)) {
    // The list in config.json spares a request for each dtype that is not there.
    if (typeof listed === "object" && listed !== null && !(file in listed)) continue;
    const bytes = await size(`onnx/${file}`);
    if (bytes !== null) graphs.push({ dtype, label, bytes: bytes + ((await size(`onnx/${file}_data`)) ?? 0) });
  }
  if (graphs.length === 0) throw new Error("The folder's onnx/ holds no graph that Transformers.js knows by name.");
  const preferred = graphs.some((graph) => graph.dtype === own.dtype) ? own.dtype : null;
  return { name: (await title()) ?? config.model_type, graphs, preferred };
}

/** The model's name: how the folder's card begins. */
async function title() {
  const heading = /^# (.+)$/m.exec((await readText("README.md")) ?? "");
  return heading && heading[1].split(", ", 1)[0];
}

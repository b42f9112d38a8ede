/** What went wrong, in words that say what to do. */

/** The file's name inside the folder, from a path or an address. @param {string} path */
const within = (path) => path.replace(/^.*?\/(?=onnx\/|[^/]+$)/, "");

/**
 * What a message matches, and what is said instead.
 * @type {[RegExp, (match: RegExpExecArray, text: string) => string][]}
 */
const CASES = [
  [
    /not found locally at "([^"]+)"/,
    (match) => `The folder has no ${within(match[1])}. Export that scheme, or choose another weights file.`,
  ],
  [/reading 'tokenizer_class'/, () => "The folder has no tokenizer_config.json, so no tokenizer is loaded."],
  [
    /webgpu|no available backend|requestAdapter/i,
    (_, text) => `WebGPU does not work in this browser (${text}). Choose WebAssembly.`,
  ],
  [
    /bad_alloc|out of memory|allocation failed/i,
    () => "The browser ran out of memory. Choose a smaller weights file or close other tabs.",
  ],
  [
    /external data|MountedFiles/i,
    (_, text) => `The weights beside the graph could not be read: ${text}`,
  ],
  [
    /is not a registered function\/op|NOT_IMPLEMENTED/i,
    (_, text) => `This runtime lacks an operator of the graph: ${text}`,
  ],
];

/** One line about an error. @param {unknown} error @returns {string} */
export function explain(error) {
  // ONNX Runtime's WebAssembly throws a bare number where an exception crosses into JavaScript.
  if (typeof error === "number") return `ONNX Runtime gave up (code ${error}), most often for lack of memory.`;
  const text = error instanceof Error ? error.message : String(error);
  for (const [pattern, say] of CASES) {
    const match = pattern.exec(text);
    if (match !== null) return say(match, text);
  }
  return text;
}

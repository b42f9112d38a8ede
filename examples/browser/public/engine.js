/**
 * Loading and generating with Transformers.js: the same code in the page's worker and in node.
 *
 * The library comes as an argument, since a worker gets it from a URL and node from its packages.
 */

/** The dtype names of Transformers.js: how the graph's file is called, and what a person calls it. */
export const DTYPES = {
  q4: { file: "model_q4.onnx", label: "4-bit" },
  q4f16: { file: "model_q4f16.onnx", label: "4-bit, 16-bit activations" },
  int8: { file: "model_int8.onnx", label: "8-bit" },
  uint8: { file: "model_uint8.onnx", label: "8-bit, unsigned" },
  q8: { file: "model_quantized.onnx", label: "8-bit, integer products" },
  bnb4: { file: "model_bnb4.onnx", label: "4-bit, bitsandbytes" },
  fp16: { file: "model_fp16.onnx", label: "16-bit float" },
  fp32: { file: "model.onnx", label: "32-bit float" },
};

/**
 * @typedef {object} Engine
 * @property {object} lib Transformers.js
 * @property {object} model
 * @property {object} tokenizer
 * @property {string | null} template the chat template, where the folder has one
 * @property {number} context most positions
 */

/**
 * Load a folder's tokenizer and one of its graphs.
 *
 * @param {object} lib Transformers.js, its `env` set so that `id` is found
 * @param {string} id
 * @param {{ dtype: string, device: string, readText: (name: string) => Promise<string | null> }} options
 *   readText gives a file of the folder, null where it is not there
 * @returns {Promise<Engine>}
 */
export async function load(lib, id, { dtype, device, readText }) {
  const tokenizer = await lib.AutoTokenizer.from_pretrained(id);
  const model = await lib.AutoModelForCausalLM.from_pretrained(id, { dtype, device });
  // transformers 5 saves the template as a file of its own, which the tokenizer of Transformers.js does not look for.
  const template = tokenizer.chat_template ? tokenizer.get_chat_template() : await readText("chat_template.jinja");
  return { lib, model, tokenizer, template, context: model.config.max_position_embeddings ?? Infinity };
}

/** Token ids of a prompt: text to be continued, or the messages of a chat. */
function encode({ tokenizer, template }, prompt) {
  if (typeof prompt === "string") return unended(tokenizer, prompt);
  if (template === null) throw new Error("This model has no chat template: it can only continue a text.");
  const options = { chat_template: template, add_generation_prompt: true, return_dict: true };
  return tokenizer.apply_chat_template(prompt, options);
}

/** Token ids of a text that goes on: without the EOS that some tokenizers put behind every text. */
function unended(tokenizer, text) {
  const inputs = tokenizer(text);
  const ids = inputs.input_ids.tolist()[0].map(Number);
  const bare = tokenizer.encode(text, { add_special_tokens: false });
  const start = ids.findIndex((_, at) => bare.every((id, n) => ids[at + n] === id));
  const end = start + bare.length;
  if (bare.length === 0 || start < 0 || end === ids.length) return inputs;
  return Object.fromEntries(Object.entries(inputs).map(([name, tensor]) => [name, tensor.slice(null, [0, end])]));
}

/**
 * @typedef {object} Reply
 * @property {number[]} promptTokens
 * @property {number[]} tokens all that were chosen, a final stop token included
 * @property {string} text
 * @property {"stop" | "length" | "interrupted"} reason
 * @property {number} firstMs until the first token
 * @property {number | null} rate tokens per second after the first
 */

/**
 * Continue a prompt.
 *
 * @param {Engine} engine
 * @param {string | { role: string, content: string }[]} prompt
 * @param {{ maxTokens: number, temperature?: number, onPiece?: (text: string) => void,
 *           stop?: { interrupted: boolean } }} options temperature 0 is greedy
 * @returns {Promise<Reply>}
 */
export async function generate(engine, prompt, { maxTokens, temperature = 0, onPiece = () => {}, stop }) {
  const { lib, model, tokenizer, context } = engine;
  const inputs = encode(engine, prompt);
  const length = inputs.input_ids.dims.at(-1);
  if (length === 0) throw new Error("The prompt is empty.");
  if (length >= context) {
    throw new Error(`The prompt is ${length} tokens and the model's context ${context}: start a new conversation.`);
  }
  const started = performance.now();
  const times = [];
  const streamer = new lib.TextStreamer(tokenizer, {
    skip_prompt: true,
    callback_function: onPiece,
    token_callback_function: () => times.push(performance.now()),
  });
  const output = await model.generate({
    ...inputs,
    max_new_tokens: Math.min(maxTokens, context - length),
    do_sample: temperature > 0,
    ...(temperature > 0 && { temperature }),
    streamer,
    stopping_criteria: stop,
  });
  const ids = output.tolist()[0].map(Number);
  const tokens = ids.slice(length);
  const seconds = (times.at(-1) - times[0]) / 1000;
  return {
    promptTokens: ids.slice(0, length),
    tokens,
    text: tokenizer.decode(tokens, { skip_special_tokens: true }),
    reason: stop?.interrupted ? "interrupted" : ends(model).has(tokens.at(-1)) ? "stop" : "length",
    firstMs: times[0] - started,
    rate: tokens.length > 1 && seconds > 0 ? (tokens.length - 1) / seconds : null,
  };
}

/** The ids that end a generation. */
function ends(model) {
  return new Set([model.generation_config?.eos_token_id ?? model.config.eos_token_id ?? []].flat());
}

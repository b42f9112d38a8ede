"""The small files of an ONNX folder: both configurations, tokenizer, templates, generation config, model card.

config.json is for Transformers.js, genai_config.json for ONNX Runtime GenAI.  What the readers of such a folder need to
be different from the checkpoint's files is changed here and reported.  Facts: Transformers.js 4.3
`src/models/session.js`, `src/configs.js`, finds a chat template in tokenizer_config.json alone; ONNX Runtime GenAI 0.18
`src/config.cpp`, refuses a `tokenizer_class` that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unicodedata import normalize

from smolexport.conversion import folder_files, model_card
from smolexport.conversion.folder_files import TOKENIZER, Files, Fixed, file_object, json_bytes
from smolexport.conversion.plan import OutputFile
from smolexport.conversion.source_model import SourceModel
from smolexport.text import few, show
from smolexport.tokenizer import Normalizer, TokenizerSpec
from smolexport.tokenizer.added_tokens import differing, leftmost
from smolexport_to_onnx.container import Layout
from smolexport_to_onnx.schemes import Scheme

JS, GENAI = "Transformers.js", "ONNX Runtime GenAI"
KNOWN_CLASS = "PreTrainedTokenizerFast"
# Keys of a source that name paths or ask for code.
DROPPED = frozenset(
    """_attn_implementation _attn_implementation_internal _commit_hash _name_or_path _orig_model_type auto_map
    compression_config name_or_path transformers.js_config""".split()
)
SEARCHED = ("do_sample", "repetition_penalty", "temperature", "top_k", "top_p")


def compose(model: SourceModel, schemes: Sequence[Scheme], layouts: Sequence[Layout]) -> dict[str, Any]:
    """The content of config.json, keys sorted: the source's, with what Transformers.js reads spelled out.

    `schemes` and `layouts` are those of the graphs, the default one first.
    """
    config = folder_files.config_of(model, DROPPED)
    halves = {scheme.js: "float16" for scheme in schemes if scheme.dtype == "F16"}
    config["transformers.js_config"] = {
        "dtype": schemes[0].js,
        "use_external_data_format": {f"{layout.stem}.onnx": 1 for layout in layouts},
        **({"kv_cache_dtype": halves} if halves else {}),
    }
    return dict(sorted(config.items()))


def genai(model: SourceModel, layout: Layout, positions: int, files: Files) -> dict[str, Any]:
    """The content of genai_config.json for the graph of `layout`; `positions` is the longest text."""
    spec, tokenizer = model.spec, model.tokenizer
    eos = folder_files.eos_ids(model)
    first = eos[0] if isinstance(eos, list) else eos
    given = file_object(files, folder_files.GENERATION)
    # Without do_sample transformers is greedy, whatever else the file says.
    search = {key: given[key] for key in SEARCHED if isinstance(given.get(key), (int, float))}
    if not search.get("do_sample"):
        search = {"do_sample": False}
    ids = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": eos,
        "pad_token_id": first if tokenizer.pad is None else tokenizer.pad,
    }
    caches = ("key", "value")
    return {
        "model": {
            "type": "decoder",
            "vocab_size": spec.vocab_size,
            "context_length": positions,
            **{key: value for key, value in ids.items() if value is not None},
            "decoder": {
                "filename": layout.graph,
                "head_size": spec.attention.head_dim,
                "hidden_size": spec.hidden_size,
                "num_attention_heads": spec.attention.num_attention_heads,
                "num_key_value_heads": spec.attention.num_key_value_heads,
                "num_hidden_layers": len(spec.layers),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **{f"past_{part}_names": f"past_key_values.%d.{part}" for part in caches},
                },
                "outputs": {"logits": "logits", **{f"present_{part}_names": f"present.%d.{part}" for part in caches}},
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            },
        },
        "search": {"max_length": positions, "past_present_share_buffer": True, **search},
    }


def copied(model: SourceModel) -> tuple[Files, tuple[str, ...]]:
    """The files from the checkpoint, and what a person should know about them; raises as `gather_files`."""
    return folder_files.gather_files(model, (_tokenizer_config,), _token_notes)


def _tokenizer_config(model: SourceModel, files: Files) -> Fixed:
    """A class and a chat template where readers look for them; None if the file has both."""
    config = file_object(files, TOKENIZER)
    lines, additions = list[str](), dict[str, object]()
    name, template = config.get("tokenizer_class"), model.tokenizer.chat_template
    if not config:
        additions |= folder_files.special_texts(model)
    if name == folder_files.NEW_CLASS or not (isinstance(name, str) and name):
        additions["tokenizer_class"] = KNOWN_CLASS
        lines.append(f"tokenizer_class {KNOWN_CLASS} replaces {name or 'none'}")
    if template is not None and not config.get("chat_template"):
        additions["chat_template"] = template
        lines.append("the chat template was added, which Transformers.js reads nowhere else")
    if not additions:
        return None, ""
    if name == folder_files.NEW_CLASS and len(additions) == 1:
        return OutputFile(
            TOKENIZER, folder_files.renamed_class(files[TOKENIZER], config, KNOWN_CLASS)
        ), f"{TOKENIZER}: {lines[0]}"
    return OutputFile(TOKENIZER, json_bytes({**config, **additions})), f"{TOKENIZER}: {'; '.join(lines)}"


def _token_notes(model: SourceModel, files: Files) -> Iterator[str]:
    """Where readers do not follow tokenizer.json, one line each.

    Facts, tested: Transformers.js 4.3, ONNX Runtime GenAI 0.18.  Plain ONNX Runtime has no tokenizer.
    """
    spec = model.tokenizer
    yield from _prompts(spec, file_object(files, TOKENIZER))
    if spec.normalizer is Normalizer.NFC:
        yield f"the tokenizer composes Unicode (NFC) and {GENAI} does not: text with decomposed accents differs there"
        kept = [token.text for token in spec.added if token.normalized and normalize("NFC", token.text) != token.text]
        if kept:
            yield f"{_few(kept)}: the tokenizer finds the composed form too, {GENAI} only this one"
        raw = [token.text for token in spec.added if not token.normalized]
        if more := [text for text in raw if normalize("NFD", text) != text]:
            yield f"{_few(more)}: {JS} finds the decomposed form too, the tokenizer only this one"
    if nul := [token.text for token in spec.added if "\0" in token.text]:
        yield f"{GENAI} reads a text up to NUL: it never finds {_few(nul)}"
    if before := [token.text for token in spec.added if token.lstrip]:
        yield f"the space before {_few(before)} stays a token of its own in {GENAI}, which does not support lstrip"
    if words := [token.text for token in spec.added if token.single_word]:
        yield f"{JS} and {GENAI} find {_few(words)} within words too: they do not support single_word"
    if len({token.normalized for token in spec.added}) > 1:
        for text, theirs, ours in differing(spec, leftmost):
            yield f"in {show(text)} {JS} and {GENAI} find {_few(theirs)}, the tokenizer {_few(ours)}"


def _prompts(spec: TokenizerSpec, config: Mapping[str, Any]) -> Iterator[str]:
    """What is put around a prompt if tokenizer.json puts something around a text."""
    before, after = (spec.bos if spec.add_bos else None), (spec.eos if spec.add_eos else None)
    places = ((before, "before"), (after, "after"))
    words = " and ".join(f"{show(spec.tokens[index])} {where}" for index, where in places if index is not None)
    if words:
        set_too = config.get("add_bos_token") or config.get("add_eos_token")
        yield (
            f"tokenizer.json puts {words} a text: {JS}'s tokenizer does so, its text-generation pipeline "
            f"{'too' if set_too else 'does not'}, {GENAI} only with add_special_tokens"
        )


def _few(texts: Sequence[str]) -> str:
    return few([show(text) for text in texts])


def card(model: SourceModel, scheme: str, dtype: str, bits_per_weight: float, lines: Sequence[str]) -> bytes:
    """The content of README.md; `dtype` is that of Transformers.js.  The same input gives the same bytes."""
    tags = ["onnx", "onnxruntime-genai"]
    return model_card.card(
        model, "transformers.js", tags, BODY, lines, scheme=scheme, dtype=dtype, bits=bits_per_weight
    )


BODY = """\
# {name}, {scheme} for ONNX Runtime

{source}, converted to ONNX by smolexport {version} with the scheme `{scheme}` ({bits:.2f} bits per weight).
{facts}
## In a web page or in Node.js

With [Transformers.js](https://huggingface.co/docs/transformers.js), prompts of different lengths one by one: a list of
them is padded on the left, which this graph's attention treats as text.

```js
import {{ pipeline }} from "@huggingface/transformers";

const generator = await pipeline("text-generation", "PATH_OR_NAME_OF_THIS_FOLDER", {{ dtype: "{dtype}" }});
console.log(await generator("Once upon a time", {{ max_new_tokens: 60 }}));
```

## Python

With [ONNX Runtime GenAI](https://onnxruntime.ai/docs/genai):

```py
import onnxruntime_genai as og

model = og.Model("PATH_TO_THIS_FOLDER")
tokenizer, parameters = og.Tokenizer(model), og.GeneratorParams(model)
parameters.set_search_options(max_length=100)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```
"""

"""The small files of an MLX folder: config.json, tokenizer, chat templates, generation config, model card.

mlx-lm, mlx-swift-lm and transformers read the same config.json and fall back to different defaults for what is absent,
so nothing that the spec knows is left to a default.  What a phone reads differently from Python is fixed here, in as
few places as possible, and reported: a `tokenizer_class` that swift-transformers does not know or that is missing, a
chat template in one of its two places.  Facts: mlx-lm 0.32.2, mlx-swift-lm of August 2026, transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from smolexport.conversion import folder_files, model_card
from smolexport.conversion.folder_files import TOKENIZER, Files, Fixed, file_object, json_bytes
from smolexport.conversion.plan import OutputFile
from smolexport.conversion.source_model import DTYPES as CLAIMS
from smolexport.conversion.source_model import SourceModel
from smolexport.model.rope import Linear, Llama3, Rope, Yarn
from smolexport.model.spec import ModelSpec
from smolexport.text import show
from smolexport.tokenizer import TokenizerKind
from smolexport_to_mlx.architectures import ROWS

KNOWN_CLASS = "PreTrainedTokenizerFast"
DTYPES: Mapping[str, str] = {dtype: name for name, dtype in CLAIMS.items()}
# Keys of a source that name paths, ask for code, or that some reader of the folder would act on although the
# checkpoint's architecture does not: Phi-3's original_max_position_embeddings, mlx-lm's rope_traditional …
DROPPED = frozenset(
    """_attn_implementation _attn_implementation_internal _commit_hash _name_or_path _orig_model_type auto_map
    compression_config model_file name_or_path original_max_position_embeddings partial_rotary_factor
    quantize_activations rope_scaling rope_traditional text_config vision_config""".split()
)


def compose(model: SourceModel, quantization: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """The content of config.json, keys sorted, for a model that `architectures.check` has passed.

    `quantization` is from `quantization_object`; None for a folder of floats.  `dtype`: `F32`, `F16` or `BF16`.
    """
    spec, mlp = model.spec, model.spec.layers[0].mlp
    config = folder_files.config_of(model, DROPPED)
    config |= {
        "intermediate_size": mlp.intermediate_size,
        "hidden_act": mlp.activation,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.context_length,
    }
    config |= _layers(spec, config) | _rope(spec.rope)
    config["dtype"] = config["torch_dtype"] = DTYPES[dtype]
    if quantization is not None:
        config["quantization"] = config["quantization_config"] = dict(quantization)
    return dict(sorted(config.items()))


def _layers(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    row, count = ROWS[spec.model_type], len(spec.layers)
    switches = {"attention_bias": spec.attention.o_bias, "mlp_bias": spec.layers[0].mlp.bias}
    keys: dict[str, Any] = {key: switches[key] for key in row.bias_keys}
    if row.nope:
        keys["no_rope_layers"] = [int(layer.mixer.rope is not None) for layer in spec.layers]
        keys["no_rope_layer_interval"] = config.get("no_rope_layer_interval") or 4
    if config.get("layer_types") is not None:
        keys["layer_types"] = ["full_attention"] * count
    return keys


def _rope(rope: Rope | None) -> dict[str, Any]:
    """Both spellings: mlx-lm's Llama and SmolLM3 read only the old one, transformers 5 prefers the new one."""
    if rope is None:  # no layer rotates, but readers expect a number
        return {"rope_theta": 10_000.0, "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}}
    scaling = _scaling(rope)
    parameters = {"rope_type": "default"} if scaling is None else scaling
    spelled: dict[str, Any] = {"rope_theta": rope.theta, "rope_parameters": {**parameters, "rope_theta": rope.theta}}
    return spelled if scaling is None else {**spelled, "rope_scaling": scaling}


def _scaling(rope: Rope) -> dict[str, Any] | None:
    """The scaling with every parameter; None without one.

    `type` repeats `rope_type` for readers that know only the older name, e.g. mlx-swift's Qwen2.
    """
    more: dict[str, float] = {}
    match rope.scaling:
        case None:
            return None
        case Linear(factor):
            kind = "linear"
        case Llama3(factor) as s:
            kind = "llama3"
            more = {
                "low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_context_length,
            }  # fmt: skip
        case Yarn(factor) as s:
            # No `truncate`: it is true here, and older readers in Swift accept no boolean in this object.
            kind = "yarn"
            more = {
                "original_max_position_embeddings": s.original_context_length, "attention_factor": s.attention_factor,
                "beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "mscale": _mscale(s), "mscale_all_dim": 0.0,
            }  # fmt: skip
    return {"type": kind, "rope_type": kind, "factor": factor, **more}


def _mscale(scaling: Yarn) -> float:
    """The `mscale` by which MLX computes the attention factor.

    MLX does not read `attention_factor`: its magnitude is 0.1 mscale ln(factor) + 1, over the same with
    mscale_all_dim, which is 0 here.  transformers reads `attention_factor` and then neither of the two.
    """
    return 10 * (scaling.attention_factor - 1) / math.log(scaling.factor) if scaling.factor > 1 else 1.0


def quantization_object(
    default: Mapping[str, Any], departures: Mapping[str, Mapping[str, Any] | Literal[False]]
) -> dict[str, Any]:
    """The object `quantization` of config.json: the default, then every module of `departures` that differs from it.

    All have `group_size`, `bits` and `mode`; a module that stays float has False.
    """
    return {**default, **{path: value for path, value in departures.items() if value != default}}


def copied(model: SourceModel) -> tuple[Files, tuple[str, ...]]:
    """The files from the checkpoint, and what a person should know about them; raises as `gather_files`."""
    return folder_files.gather_files(model, (_tokenizer_config, _template), _notes)


def _notes(model: SourceModel, files: Files) -> Iterator[str]:
    yield from _stop_notes(model, files)
    spec = model.tokenizer
    if spec.add_eos and spec.eos is not None:
        end = show(spec.tokens[spec.eos])
        yield f"tokenizer.json puts {end} after a text: mlx_lm.generate and transformers do so with plain prompts"


def _tokenizer_config(model: SourceModel, files: Files) -> Fixed:
    config = file_object(files, TOKENIZER)
    name = config.get("tokenizer_class")
    if name == folder_files.NEW_CLASS:
        return (
            OutputFile(TOKENIZER, folder_files.renamed_class(files[TOKENIZER], config, KNOWN_CLASS)),
            f"{TOKENIZER}: tokenizer_class {folder_files.NEW_CLASS} became {KNOWN_CLASS}, which Swift knows too",
        )
    if isinstance(name, str) and name:
        return None, ""
    if model.tokenizer.kind is not TokenizerKind.BYTES:  # its class depends on the family; none is right for all
        return None, f"{TOKENIZER}: has no tokenizer_class; Python does not need it, Swift will not load the tokenizer"
    config = {**(config or folder_files.special_texts(model)), "tokenizer_class": KNOWN_CLASS}
    line = f"{TOKENIZER}: tokenizer_class {KNOWN_CLASS} was added; Swift does not load a tokenizer without one"
    return OutputFile(TOKENIZER, json_bytes(config)), line


def _template(model: SourceModel, files: Files) -> Fixed:  # noqa: ARG001
    """chat_template.jinja if the default template is only elsewhere; named ones stay where they are."""
    spec = model.tokenizer
    if (model.folder / folder_files.TEMPLATE).is_file() or spec.chat_template is None or spec.chat_templates:
        return None, ""
    return OutputFile(folder_files.TEMPLATE, spec.chat_template.encode("utf-8")), ""


def _stop_notes(model: SourceModel, files: Files) -> Iterator[str]:
    """Tokens that end a text for the checkpoint's tokenizer, but not for MLX.

    Both readers stop at the tokenizer's eos_token and at the ids of one file: generation_config.json, or config.json
    if that has none; mlx-lm treats a lone 0 as none too.
    """
    own, other = file_object(files, folder_files.GENERATION).get("eos_token_id"), folder_files.config_eos(model)
    named = any(file_object(files, name).get("eos_token") for name in (TOKENIZER, folder_files.SPECIAL))
    misses: dict[tuple[int, ...], list[str]] = {}
    for reader, value in (("mlx-lm", own or other), ("mlx-swift", other if own is None else own)):
        stops = {*(value if isinstance(value, list) else [value]), *([model.tokenizer.eos] if named else [])}
        misses.setdefault(tuple(sorted(model.tokenizer.stop_tokens - stops)), []).append(reader)
    for missing, readers in misses.items():
        if missing:
            listed = ", ".join(f"{index} ({show(model.tokenizer.tokens[index])})" for index in missing)
            yield (
                f"{' and '.join(readers)} will not stop at {listed}: eos_token_id is {show(own)} in "
                f"{folder_files.GENERATION}, {show(other)} in config.json"
            )


def card(model: SourceModel, scheme: str, bits_per_weight: float, lines: Sequence[str]) -> bytes:
    """The content of README.md; the same input gives the same bytes."""
    return model_card.card(model, "mlx", ["mlx"], BODY, lines, scheme=scheme, bits=bits_per_weight)


BODY = """\
# {name}, {scheme} for MLX

{source}, converted to MLX by smolexport {version} with the scheme `{scheme}` ({bits:.2f} bits per weight).
{facts}
## Python

```sh
pip install mlx-lm
mlx_lm.generate --model PATH_TO_THIS_FOLDER --prompt "Once upon a time"
```

## Swift

With [mlx-swift-lm](https://github.com/ml-explore/mlx-swift-lm) 3, on a device or a Mac with Apple silicon:

```swift
import Foundation
import HuggingFace
import MLXHuggingFace
import MLXLLM
import MLXLMCommon
import Tokenizers

let folder = URL(filePath: "PATH_TO_THIS_FOLDER")
let model = try await loadModelContainer(from: folder, using: #huggingFaceTokenizerLoader())
print(try await ChatSession(model).respond(to: "Tell me a story."))
```
"""

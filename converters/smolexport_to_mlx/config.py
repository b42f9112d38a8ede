"""config.json of an MLX folder: the source's, with everything that decides a computation spelled out.

mlx-lm, mlx-swift-lm and transformers read the same file and fall back to different defaults for what is absent, so
nothing that the spec knows is left to a default.  Facts: mlx-lm 0.32.2, mlx-swift-lm of August 2026, transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from smolexport.conversion.folder_files import config_eos, writable
from smolexport.conversion.source_model import DTYPES as CLAIMS
from smolexport.conversion.source_model import SourceModel
from smolexport.model.rope import Linear, Llama3, Rope, Yarn
from smolexport.model.spec import ModelSpec
from smolexport_to_mlx.architectures import ROWS

DTYPES: Mapping[str, str] = {dtype: name for name, dtype in CLAIMS.items()}
# Keys of a source that name places, ask for code, or that some reader of the folder would act upon although the
# checkpoint's architecture does not: Phi-3's original_max_position_embeddings, mlx-lm's rope_traditional …
DROPPED = frozenset(
    """_attn_implementation _attn_implementation_internal _commit_hash _name_or_path _orig_model_type auto_map
    compression_config model_file name_or_path original_max_position_embeddings partial_rotary_factor
    quantize_activations rope_scaling rope_traditional text_config vision_config""".split()
)


def compose(model: SourceModel, quantization: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """The content of config.json, keys sorted.

    Args:
        model: a model that `architectures.check` has passed.
        quantization: what `quantization_object` made; None for a folder of floats.
        dtype: of the folder's float tensors, `F32`, `F16` or `BF16`.
    """
    spec = model.spec
    config = {
        key: value
        for key, value in model.config.items()
        if key not in DROPPED and not key.startswith("quantization") and writable(key, value)
    }
    config |= _sizes(spec) | _layers(spec, config) | _rope(spec.rope)
    config["eos_token_id"] = config_eos(model)
    for key, index in (("bos_token_id", model.tokenizer.bos), ("pad_token_id", model.tokenizer.pad)):
        config.setdefault(key, index)
    config["dtype"] = config["torch_dtype"] = DTYPES[dtype]
    if quantization is not None:
        config["quantization"] = config["quantization_config"] = dict(quantization)
    return dict(sorted(config.items()))


def _sizes(spec: ModelSpec) -> dict[str, Any]:
    heads, mlp = spec.attention, spec.layers[0].mlp
    return {
        "model_type": spec.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": mlp.intermediate_size,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": heads.num_attention_heads,
        "num_key_value_heads": heads.num_key_value_heads,
        "head_dim": heads.head_dim,
        "hidden_act": mlp.activation,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.context_length,
        "tie_word_embeddings": spec.tied,
    }


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
    if rope is None:  # no layer rotates, but readers want a number
        return {"rope_theta": 10_000.0, "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}}
    scaling = _scaling(rope)
    parameters = {"rope_type": "default"} if scaling is None else scaling
    spelled: dict[str, Any] = {"rope_theta": rope.theta, "rope_parameters": {**parameters, "rope_theta": rope.theta}}
    return spelled if scaling is None else {**spelled, "rope_scaling": scaling}


def _scaling(rope: Rope) -> dict[str, Any] | None:
    """The scaling with every parameter; None without one.

    `type` stands beside `rope_type` for readers that know only the older name, mlx-swift's Qwen2 among them.
    """
    match rope.scaling:
        case None:
            return None
        case Linear(factor):
            return {"type": "linear", "rope_type": "linear", "factor": factor}
        case Llama3() as s:
            return {
                "type": "llama3",
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_context_length,
            }
        case Yarn() as s:
            # No `truncate`: it is true here, and older readers in Swift take no boolean in this object.
            return {
                "type": "yarn",
                "rope_type": "yarn",
                "factor": s.factor,
                "original_max_position_embeddings": s.original_context_length,
                "attention_factor": s.attention_factor,
                "beta_fast": s.beta_fast,
                "beta_slow": s.beta_slow,
                "mscale": _mscale(s),
                "mscale_all_dim": 0.0,
            }


def _mscale(scaling: Yarn) -> float:
    """The `mscale` by which MLX arrives at the attention factor.

    MLX does not read `attention_factor`: its magnitude is 0.1 mscale ln(factor) + 1, over the same with
    mscale_all_dim, which is 0 here.  transformers reads `attention_factor` and then neither of the two.
    """
    return 10 * (scaling.attention_factor - 1) / math.log(scaling.factor) if scaling.factor > 1 else 1.0


def quantization_object(
    default: Mapping[str, Any], departures: Mapping[str, Mapping[str, Any] | Literal[False]]
) -> dict[str, Any]:
    """The object `quantization` of config.json.

    Args:
        default: `group_size`, `bits`, `mode` of every module that is not named.
        departures: module path -> the same three for one that differs, False for one that stays float.  A module
            that equals the default is not written.

    Returns:
        The three keys, then every departing module in the order given, all three keys in each.
    """
    common = _quantized(default)
    named = {path: value if value is False else _quantized(value) for path, value in departures.items()}
    return {**common, **{path: value for path, value in named.items() if value != common}}


def _quantized(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "group_size": int(value["group_size"]),
        "bits": int(value["bits"]),
        "mode": str(value.get("mode", "affine")),
    }

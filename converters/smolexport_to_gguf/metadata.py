"""The GGUF key/values of a model: sizes, rotary embeddings, file type, tokenizer.

Source: llama.cpp `src/llama-arch.cpp` (keys), `src/llama-model.cpp` and `src/models` (who reads them).
"""

from __future__ import annotations

import math
from typing import Any

from smolexport.conversion import portable
from smolexport.conversion.source_model import SCHEME_KEY
from smolexport.model.rope import Linear, Llama3, Rope, Yarn
from smolexport.model.spec import ModelSpec
from smolexport_to_gguf.architectures import ROWS, is_plain_yarn
from smolexport_to_gguf.schemes import Scheme

QUANTIZATION_VERSION = 2


def model_metadata(spec: ModelSpec, scheme: Scheme, name: str) -> list[tuple[str, str, Any]]:
    """(key, kind, value) of everything but the tokenizer, in file order; `name` is what people call the model."""
    a, heads = ROWS[spec.model_type].name, spec.attention
    rows: list[tuple[str, str, Any]] = [
        ("general.architecture", "string", a),
        ("general.type", "string", "model"),
        ("general.name", "string", name),
        ("general.file_type", "u32", scheme.file_type),
    ]
    if scheme.name in portable.NAMES:  # the file type is that of the format underneath
        rows.append((SCHEME_KEY, "string", scheme.name))
    if scheme.quantized:
        rows.append(("general.quantization_version", "u32", QUANTIZATION_VERSION))
    return [
        *rows,
        (f"{a}.vocab_size", "u32", spec.vocab_size),
        (f"{a}.context_length", "u32", spec.context_length),
        (f"{a}.embedding_length", "u32", spec.hidden_size),
        (f"{a}.block_count", "u32", len(spec.layers)),
        (f"{a}.feed_forward_length", "u32", spec.layers[0].mlp.intermediate_size),
        (f"{a}.attention.head_count", "u32", heads.num_attention_heads),
        (f"{a}.attention.head_count_kv", "u32", heads.num_key_value_heads),
        (f"{a}.attention.key_length", "u32", heads.head_dim),
        (f"{a}.attention.value_length", "u32", heads.head_dim),
        (f"{a}.attention.layer_norm_rms_epsilon", "f32", spec.norm_eps),
        (f"{a}.rope.dimension_count", "u32", heads.head_dim),
        *_rope_metadata(a, spec.rope),
    ]


def _rope_metadata(a: str, rope: Rope | None) -> list[tuple[str, str, Any]]:
    if rope is None:
        return []
    rows: list[tuple[str, str, Any]] = [(f"{a}.rope.freq_base", "f32", rope.theta)]
    match rope.scaling:
        case Linear(factor):
            rows += [(f"{a}.rope.scaling.type", "string", "linear"), (f"{a}.rope.scaling.factor", "f32", factor)]
        case Yarn() if is_plain_yarn(rope.scaling):
            rows += [
                (f"{a}.rope.scaling.type", "string", "yarn"),
                (f"{a}.rope.scaling.factor", "f32", rope.scaling.factor),
                (f"{a}.rope.scaling.original_context_length", "u32", rope.scaling.original_context_length),
            ]
            # llama.cpp multiplies its own magnitude, 1 + 0.1 ln(factor), by this key.
            own = 1 + 0.1 * math.log(rope.scaling.factor)
            if not math.isclose(rope.scaling.attention_factor, own, rel_tol=1e-9):
                rows.append((f"{a}.rope.scaling.attn_factor", "f32", rope.scaling.attention_factor / own))
        case Yarn(attention_factor=attention_factor):
            # The frequencies travel as factors per dimension pair, only the magnitude is left to a key.
            rows.append((f"{a}.rope.scaling.attn_factor", "f32", attention_factor))
    return rows


def rope_factors(spec: ModelSpec) -> tuple[float, ...]:
    """The divisor of each angle in llama.cpp (`rope_freqs.weight`, [head_dim / 2]); empty if it needs none."""
    rope = spec.rope
    if rope is None or not ROWS[spec.model_type].rope_factors:
        return ()
    by_factors = isinstance(rope.scaling, Llama3) or (
        isinstance(rope.scaling, Yarn) and not is_plain_yarn(rope.scaling)
    )
    if not by_factors:
        return ()
    return tuple((rope.plain_inverse_frequencies() / rope.inverse_frequencies()).tolist())

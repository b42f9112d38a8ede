"""What mlx-lm's class for each architecture computes, and where that differs from what a checkpoint says.

One row per `model_type`.  Facts: mlx-lm 0.32.2, `mlx_lm/models/{llama,smollm3,qwen2,qwen3,rope_utils}.py`; for phones
mlx-swift-lm, `Libraries/MLXLLM/Models/{Llama,SmolLM3,Qwen2,Qwen3}.swift`, state of August 2026.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from smolexport.model.rope import Linear, Llama3, Rope, Yarn
from smolexport.model.spec import ModelSpec

__all__ = ["ROWS", "Row", "check", "notes", "rope_of"]

SCALINGS = {Linear: "linear", Llama3: "llama3", Yarn: "yarn"}


@dataclass(frozen=True)
class Row:
    """What one class of mlx-lm can do.

    Attributes:
        biases: what `qkv_bias`, `o_bias` and `mlp_bias` of a spec must be; a projection that is not named follows
            the config.
        one_switch: the biases of q, k, v and o come and go together (`attention_bias`).
        bias_keys: keys of config.json that some reader of the folder switches biases by.
        qk_norm: queries and keys are normalised.
        square: head_dim is always hidden_size / num_attention_heads.
        nope: layers can go without rotary embedding.
        swift_scalings: kinds of rope scaling that mlx-swift-lm applies.
        swift_otherwise: what it does with the others.
    """

    biases: Mapping[str, bool]
    one_switch: bool = False
    bias_keys: tuple[str, ...] = ()
    qk_norm: bool = False
    square: bool = False
    nope: bool = False
    swift_scalings: tuple[type, ...] = ()
    swift_otherwise: str = "ignores it: the model runs with other angles there"


ATTENTION_AND_MLP = ("attention_bias", "mlp_bias")
ROWS: Mapping[str, Row] = {
    "llama": Row(
        {},
        one_switch=True,
        bias_keys=ATTENTION_AND_MLP,
        swift_scalings=(Linear, Llama3),
        swift_otherwise="refuses to load such a folder",
    ),
    "smollm3": Row({}, one_switch=True, bias_keys=ATTENTION_AND_MLP, nope=True),
    "qwen2": Row({"qkv_bias": True, "o_bias": False, "mlp_bias": False}, square=True, swift_scalings=(Linear,)),
    "qwen3": Row(
        {"qkv_bias": False, "o_bias": False, "mlp_bias": False},
        bias_keys=("attention_bias",),
        qk_norm=True,
        swift_scalings=(Linear,),
    ),
}


def rope_of(spec: ModelSpec) -> Rope | None:
    """The rotary embedding of the layers that have one; None when no layer has."""
    return next((layer.rope for layer in spec.layers if layer.rope is not None), None)


def check(spec: ModelSpec) -> list[str]:
    """Reasons why mlx-lm would refuse `spec` or silently compute something else; empty when it is fine."""
    row = ROWS.get(spec.model_type)
    if row is None:
        return [f"MLX: no class is known for model_type '{spec.model_type}'; known: {', '.join(ROWS)}"]
    name = f"mlx-lm's {spec.model_type} class"
    return [f"{name} {reason}" for reason in (*_layers(spec, row), *_rope(spec), *_projections(spec, row))]


def _layers(spec: ModelSpec, row: Row) -> Iterator[str]:
    bare = [i for i, layer in enumerate(spec.layers) if layer.rope is None]
    if bare and not row.nope:
        yield f"applies rotary embeddings on every layer, the checkpoint none on layers {bare}"
    windows = {i: layer.window for i, layer in enumerate(spec.layers) if layer.window is not None}
    if windows:
        layer, window = next(iter(windows.items()))
        yield (
            f"is exported with full attention only, the checkpoint has sliding windows on {len(windows)} layers "
            f"({window} tokens on layer {layer})"
        )
    ropes = list(dict.fromkeys(layer.rope for layer in spec.layers if layer.rope is not None))
    if len(ropes) > 1:
        yield f"has one rotary embedding for all layers, the checkpoint {len(ropes)}: {ropes[0]} and {ropes[1]}"


def _rope(spec: ModelSpec) -> Iterator[str]:
    rope = rope_of(spec)
    if rope is None:
        return
    if rope.dim != spec.head_dim:
        yield f"rotates all {spec.head_dim} dimensions of a head, the checkpoint {rope.dim}"
    if isinstance(rope.scaling, Yarn):
        if not rope.scaling.truncate:
            yield "rounds the limits of YaRN's ramp (truncate true), the checkpoint has truncate false"
        if rope.scaling.factor <= 1 and rope.scaling.attention_factor != 1:
            yield (
                f"has no magnitude but 1 at a YaRN factor of {rope.scaling.factor:g}, the checkpoint has an "
                f"attention_factor of {rope.scaling.attention_factor:g}"
            )


def _projections(spec: ModelSpec, row: Row) -> Iterator[str]:
    for key, fixed in row.biases.items():
        if getattr(spec, key) != fixed:
            yield f"has {key} {_flag(fixed)}, the checkpoint {_flag(not fixed)}"
    if row.one_switch and spec.qkv_bias != spec.o_bias:
        yield (
            f"has biases on all of q, k, v and o or on none, the checkpoint has qkv_bias {_flag(spec.qkv_bias)} and "
            f"o_bias {_flag(spec.o_bias)}"
        )
    if row.qk_norm != spec.qk_norm:
        yield f"has query and key norms {_flag(row.qk_norm)}, the checkpoint {_flag(spec.qk_norm)}"
    if row.square and spec.num_attention_heads * spec.head_dim != spec.hidden_size:
        yield (
            f"takes head_dim = hidden_size / num_attention_heads, the checkpoint has a head_dim of {spec.head_dim} "
            f"with {spec.hidden_size} / {spec.num_attention_heads}"
        )
    if spec.activation != "silu":
        yield f"computes silu, the checkpoint {spec.activation}"


def _flag(value: bool) -> str:
    return str(value).lower()


def notes(spec: ModelSpec) -> list[str]:
    """What a person should know about running `spec`, which `check` has passed, on a phone."""
    row, rope = ROWS[spec.model_type], rope_of(spec)
    if rope is None or rope.scaling is None or isinstance(rope.scaling, row.swift_scalings):
        return []
    kind = SCALINGS[type(rope.scaling)]
    return [f"rope scaling {kind}: mlx-lm applies it; mlx-swift's {spec.model_type} {row.swift_otherwise}"]

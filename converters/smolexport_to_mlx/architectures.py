"""What mlx-lm's class for each architecture computes, and where that differs from what a checkpoint says.

One row per `model_type`.  Facts: mlx-lm 0.32.2, `mlx_lm/models/{llama,smollm3,qwen2,qwen3,rope_utils}.py`; for phones
mlx-swift-lm, `Libraries/MLXLLM/Models/{Llama,SmolLM3,Qwen2,Qwen3}.swift`, state of August 2026.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from smolexport.model.rope import Linear, Llama3, Yarn
from smolexport.model.spec import ModelSpec, departures

SCALINGS = {Linear: "linear", Llama3: "llama3", Yarn: "yarn"}


@dataclass(frozen=True)
class Row:
    """What one class of mlx-lm can do.

    Attributes:
        computed: what it computes beside, or instead of, `COMPUTED`.
        one_switch: the biases of q, k, v and o come and go together (`attention_bias`).
        bias_keys: keys of config.json that some reader of the folder switches biases by.
        square: head_dim is always hidden_size / num_attention_heads.
        nope: layers can go without rotary embedding.
        swift_scalings: kinds of rope scaling that mlx-swift-lm applies.
        swift_otherwise: what it does with the others.
    """

    computed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    one_switch: bool = False
    bias_keys: tuple[str, ...] = ()
    square: bool = False
    nope: bool = False
    swift_scalings: tuple[type, ...] = ()
    swift_otherwise: str = "ignores it: the model runs with other angles there"


ATTENTION_AND_MLP = ("attention_bias", "mlp_bias")
COMPUTED: Mapping[str, tuple[object, ...]] = {
    # mlx-lm's Llama has windows, but no model in which every layer has one.
    "mixer.window": (None,), "mixer.qk_norm": (False,), "mlp.activation": ("silu",),
}  # fmt: skip
NO_OUTPUT_BIAS: Mapping[str, tuple[object, ...]] = {"mixer.o_bias": (False,), "mlp.bias": (False,)}
NO_BIAS: Mapping[str, tuple[object, ...]] = {**NO_OUTPUT_BIAS, "mixer.qkv_bias": (False,)}
LLAMA = Row(
    one_switch=True,
    bias_keys=ATTENTION_AND_MLP,
    swift_scalings=(Linear, Llama3),
    swift_otherwise="refuses to load such a folder",
)
ROWS: Mapping[str, Row] = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, computed=NO_BIAS, one_switch=False, bias_keys=()),
    "smollm3": Row(one_switch=True, bias_keys=ATTENTION_AND_MLP, nope=True),
    "qwen2": Row({**NO_OUTPUT_BIAS, "mixer.qkv_bias": (True,)}, square=True, swift_scalings=(Linear,)),
    "qwen3": Row(
        {**NO_BIAS, "mixer.qk_norm": (True,)},
        bias_keys=("attention_bias",),
        swift_scalings=(Linear,),
    ),
}


def check(spec: ModelSpec) -> list[str]:
    """Reasons why mlx-lm would refuse `spec` or silently compute something else; empty when it is fine."""
    row = ROWS.get(spec.model_type)
    if row is None:
        return [f"MLX: no class is known for model_type '{spec.model_type}'; known: {', '.join(ROWS)}"]
    name = f"mlx-lm's {spec.model_type} class"
    told = list(departures(spec, {**COMPUTED, **row.computed}))
    return [f"{name} {reason}" for reason in told or (*_layers(spec, row), *_rope(spec), *_projections(spec, row))]


def _layers(spec: ModelSpec, row: Row) -> Iterator[str]:
    bare = [i for i, layer in enumerate(spec.layers) if layer.mixer.rope is None]
    if bare and not row.nope:
        yield f"applies rotary embeddings on every layer, the checkpoint none on layers {bare}"
    if spec.rearranged:
        yield f"reads every tensor under a name of its own, as it is; the checkpoint rearranges {spec.rearranged[0]}"
    ropes = [rope for rope in dict.fromkeys(layer.mixer.rope for layer in spec.layers) if rope is not None]
    if len(ropes) > 1:
        yield f"has one rotary embedding for all layers, the checkpoint {len(ropes)}: {ropes[0]} and {ropes[1]}"


def _rope(spec: ModelSpec) -> Iterator[str]:
    rope = spec.rope
    if rope is None:
        return
    if rope.dim != spec.attention.head_dim:
        yield f"rotates all {spec.attention.head_dim} dimensions of a head, the checkpoint {rope.dim}"
    if isinstance(rope.scaling, Yarn):
        if not rope.scaling.truncate:
            yield "rounds the limits of YaRN's ramp (truncate true), the checkpoint has truncate false"
        if rope.scaling.factor <= 1 and rope.scaling.attention_factor != 1:
            yield (
                f"has no magnitude but 1 at a YaRN factor of {rope.scaling.factor:g}, the checkpoint has an "
                f"attention_factor of {rope.scaling.attention_factor:g}"
            )


def _projections(spec: ModelSpec, row: Row) -> Iterator[str]:
    odd = next((layer.mixer for layer in spec.layers if layer.mixer.qkv_bias != layer.mixer.o_bias), None)
    if row.one_switch and odd:
        yield (
            f"has biases on all of q, k, v and o or on none, the checkpoint has qkv_bias {_flag(odd.qkv_bias)} and "
            f"o_bias {_flag(odd.o_bias)}"
        )
    a = spec.attention
    if row.square and a.num_attention_heads * a.head_dim != spec.hidden_size:
        yield (
            f"takes head_dim = hidden_size / num_attention_heads, the checkpoint has a head_dim of {a.head_dim} "
            f"with {spec.hidden_size} / {a.num_attention_heads}"
        )


def _flag(value: bool) -> str:
    return str(value).lower()


def notes(spec: ModelSpec) -> list[str]:
    """What a person should know about running `spec`, which `check` has passed, on a phone."""
    row, rope = ROWS[spec.model_type], spec.rope
    if rope is None or rope.scaling is None or isinstance(rope.scaling, row.swift_scalings):
        return []
    kind = SCALINGS[type(rope.scaling)]
    return [f"rope scaling {kind}: mlx-lm applies it; mlx-swift's {spec.model_type} {row.swift_otherwise}"]

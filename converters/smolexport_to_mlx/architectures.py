"""What mlx-lm's class for each architecture computes, and where that differs from a checkpoint.

One row per `model_type`.  Facts: mlx-lm 0.32.2, `mlx_lm/models/{llama,smollm3,qwen2,qwen3,rope_utils}.py`; for phones
mlx-swift-lm, `Libraries/MLXLLM/Models/{Llama,SmolLM3,Qwen2,Qwen3}.swift`, state of August 2026.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from smolexport.conversion.converter import other_head_dim, refusals, several_ropes
from smolexport.model.rope import Linear, Llama3, Rope, Yarn
from smolexport.model.spec import ModelSpec

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
    """Reasons why mlx-lm would refuse `spec` or silently compute something else; empty if it is fine."""
    row = ROWS.get(spec.model_type)
    if row is None:
        return [f"MLX: no class is known for model_type '{spec.model_type}'; known: {', '.join(ROWS)}"]
    return refusals(f"mlx-lm's {spec.model_type} class", spec, {**COMPUTED, **row.computed}, _reasons(spec, row))


def _reasons(spec: ModelSpec, row: Row) -> Iterator[str]:
    bare = [i for i, layer in enumerate(spec.layers) if layer.mixer.rope is None]
    if bare and not row.nope:
        yield f"applies rotary embeddings on every layer, the checkpoint none on layers {bare}"
    if spec.rearranged:
        yield f"reads every tensor under its own name, as it is; the checkpoint rearranges {spec.rearranged[0]}"
    yield from several_ropes(spec)
    if spec.rope is not None:
        yield from _rope(spec.rope, spec.attention.head_dim)
    odd = next((layer.mixer for layer in spec.layers if layer.mixer.qkv_bias != layer.mixer.o_bias), None)
    if row.one_switch and odd:
        yield (
            "has biases on all of q, k, v and o or on none, the checkpoint has "
            f"qkv_bias {str(odd.qkv_bias).lower()} and o_bias {str(odd.o_bias).lower()}"
        )
    if row.square:
        yield from other_head_dim(spec)


def _rope(rope: Rope, head_dim: int) -> Iterator[str]:
    if rope.dim != head_dim:
        yield f"rotates all {head_dim} dimensions of a head, the checkpoint {rope.dim}"
    if isinstance(rope.scaling, Yarn):
        if not rope.scaling.truncate:
            yield "rounds the limits of YaRN's ramp (truncate true), the checkpoint has truncate false"
        if rope.scaling.factor <= 1 and rope.scaling.attention_factor != 1:
            yield (
                f"has no magnitude but 1 at a YaRN factor of {rope.scaling.factor:g}, the checkpoint has an "
                f"attention_factor of {rope.scaling.attention_factor:g}"
            )


def notes(spec: ModelSpec) -> list[str]:
    """What a person should know about running `spec`, which `check` has passed, on a phone."""
    row, rope = ROWS[spec.model_type], spec.rope
    if rope is None or rope.scaling is None or isinstance(rope.scaling, row.swift_scalings):
        return []
    kind = SCALINGS[type(rope.scaling)]
    return [f"rope scaling {kind}: mlx-lm applies it; mlx-swift's {spec.model_type} {row.swift_otherwise}"]

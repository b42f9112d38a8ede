"""What the graph can express, and what of a model it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from smolexport.conversion.converter import refusals
from smolexport.model.spec import ModelSpec

COMPUTED: Mapping[str, tuple[object, ...]] = {"mlp.activation": ("silu",)}
HEAD_UNIT, ROTARY_UNIT = 8, 16  # GroupQueryAttention in ONNX Runtime 1.31 takes, and rotates, heads of multiples of


def check(spec: ModelSpec) -> list[str]:
    """Reasons why the graph would compute something else than `spec`; empty if it is fine.

    No row per architecture: the graph is built from the spec, so any model that a spec describes can be exported.
    """
    return refusals("the ONNX graph", spec, COMPUTED, _reasons(spec))


def _reasons(spec: ModelSpec) -> Iterator[str]:
    a = spec.attention
    partial = {layer.mixer.rope.dim for layer in spec.layers if layer.mixer.rope is not None} - {a.head_dim}
    if partial:
        yield f"rotates all {a.head_dim} dimensions of a head, the checkpoint {min(partial)}"
    if a.head_dim % HEAD_UNIT:
        yield f"has heads of a multiple of {HEAD_UNIT} dimensions, the checkpoint of {a.head_dim}"
    if a.num_attention_heads % a.num_key_value_heads:
        yield (
            f"shares each key head among as many query heads, the checkpoint has {a.num_attention_heads} query "
            f"heads and {a.num_key_value_heads} key heads"
        )


def rotated_apart(spec: ModelSpec) -> bool:
    """Whether rotary embeddings need an operator of their own."""
    return spec.attention.head_dim % ROTARY_UNIT != 0


def notes(spec: ModelSpec, positions: int) -> Iterator[str]:
    """What a person should know about running `spec` with rotary tables of `positions`."""
    if positions < spec.context_length:
        yield (
            f"positions up to {positions} of the {spec.context_length} that the model knows; "
            f"--set max_positions={spec.context_length} for all of them"
        )
    windows = sorted({layer.mixer.window for layer in spec.layers if layer.mixer.window is not None})
    if windows:
        yield f"sliding windows of {', '.join(map(str, windows))} tokens: tested on the CPU, untested in browsers"
    if rotated_apart(spec):
        yield (
            f"heads of {spec.attention.head_dim} dimensions: rotated by an operator of their own, since "
            "GroupQueryAttention rotates multiples of 16 only; a batch must not be padded"
        )

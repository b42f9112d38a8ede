"""What the graph can express, and what of a model it cannot."""

from __future__ import annotations

from collections.abc import Iterator

from smolexport.spec import ModelSpec

__all__ = ["check", "notes", "rotated_apart"]

HEAD_UNIT, ROTARY_UNIT = 8, 16  # GroupQueryAttention in ONNX Runtime 1.31 takes, and rotates, heads of multiples of


def check(spec: ModelSpec) -> list[str]:
    """Reasons why the graph would compute something else than `spec`; empty when it is fine.

    No row per architecture: the graph is made of what the spec says, so any model that a spec describes is exported.
    """
    return [f"the ONNX graph {reason}" for reason in _reasons(spec)]


def _reasons(spec: ModelSpec) -> Iterator[str]:
    if not spec.layers:
        yield "has at least one layer, the checkpoint has none"
    windows = {i: layer.window for i, layer in enumerate(spec.layers) if layer.window is not None}
    if windows:
        layer, window = next(iter(windows.items()))
        yield (
            f"has full attention only, the checkpoint has sliding windows on {len(windows)} layers "
            f"({window} tokens on layer {layer})"
        )
    partial = {layer.rope.dim for layer in spec.layers if layer.rope is not None and layer.rope.dim != spec.head_dim}
    if partial:
        yield f"rotates all {spec.head_dim} dimensions of a head, the checkpoint {min(partial)}"
    if spec.head_dim % HEAD_UNIT:
        yield f"has heads of a multiple of {HEAD_UNIT} dimensions, the checkpoint of {spec.head_dim}"
    if spec.num_attention_heads % spec.num_key_value_heads:
        yield (
            f"shares each key head among as many query heads, the checkpoint has {spec.num_attention_heads} query "
            f"heads and {spec.num_key_value_heads} key heads"
        )
    if spec.activation != "silu":
        yield f"computes silu, the checkpoint {spec.activation}"


def rotated_apart(spec: ModelSpec) -> bool:
    """Whether rotary embeddings need an operator of their own."""
    return spec.head_dim % ROTARY_UNIT != 0


def notes(spec: ModelSpec, positions: int) -> Iterator[str]:
    """What a person should know about running `spec` with rotary tables of `positions`."""
    if positions < spec.context_length:
        yield (
            f"positions up to {positions} of the {spec.context_length} that the model knows; "
            f"--set max_positions={spec.context_length} for all of them"
        )
    if rotated_apart(spec):
        yield (
            f"heads of {spec.head_dim} dimensions: rotated by an operator of their own, since GroupQueryAttention "
            "rotates multiples of 16 only; a batch must not be padded"
        )

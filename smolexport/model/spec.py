"""What a decoder is: sizes, layers, and every tensor that must exist, as plain data.

The layer is told, never asked: whatever differs from layer to layer stands in `Layer`, so that no converter
or runtime needs to know which family a model belongs to.

Notation: h = hidden_size, i = intermediate_size, d = head_dim, q = num_attention_heads,
k = num_key_value_heads, v = vocab_size.  Matrices are [out, in], as in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from smolexport.model.rope import Rope

__all__ = ["Layer", "ModelSpec", "Role", "Tensor"]


class Role(Enum):
    """What a tensor does.  The value is its place in a transformers checkpoint, `{}` = layer."""

    EMBED = "model.embed_tokens"
    ATTN_NORM = "model.layers.{}.input_layernorm"
    Q = "model.layers.{}.self_attn.q_proj"
    K = "model.layers.{}.self_attn.k_proj"
    V = "model.layers.{}.self_attn.v_proj"
    Q_NORM = "model.layers.{}.self_attn.q_norm"
    K_NORM = "model.layers.{}.self_attn.k_norm"
    O = "model.layers.{}.self_attn.o_proj"  # noqa: E741
    MLP_NORM = "model.layers.{}.post_attention_layernorm"
    GATE = "model.layers.{}.mlp.gate_proj"
    UP = "model.layers.{}.mlp.up_proj"
    DOWN = "model.layers.{}.mlp.down_proj"
    FINAL_NORM = "model.norm"
    HEAD = "lm_head"


@dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint: its role, layer (None outside the layers), part and shape."""

    role: Role
    layer: int | None
    part: str
    shape: tuple[int, ...]

    @property
    def source(self) -> str:
        """Name in a transformers checkpoint."""
        return f"{self.role.value.format(self.layer)}.{self.part}"

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.shape[0] * (self.shape[1] if len(self.shape) == 2 else 1)


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer.  No rotary embedding (NoPE) = `rope` is None."""

    rope: Rope | None
    window: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A dense decoder: pre-norm blocks of grouped-query attention and a gated feed-forward.

    Biases are told per projection group; `qk_norm` is RMS normalisation of each query and key head.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    tied: bool
    norm_eps: float
    context_length: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that must exist, in the order of the forward pass.  A tied head is not listed."""
        h, v = self.hidden_size, self.vocab_size
        yield Tensor(Role.EMBED, None, "weight", (v, h))
        for layer in range(len(self.layers)):
            yield from self._layer_tensors(layer)
        yield Tensor(Role.FINAL_NORM, None, "weight", (h,))
        if not self.tied:
            yield Tensor(Role.HEAD, None, "weight", (v, h))

    def _layer_tensors(self, layer: int) -> Iterator[Tensor]:
        h, i, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, k = self.num_attention_heads * d, self.num_key_value_heads * d

        def linear(role: Role, out: int, columns: int, bias: bool) -> Iterator[Tensor]:
            yield Tensor(role, layer, "weight", (out, columns))
            if bias:
                yield Tensor(role, layer, "bias", (out,))

        yield Tensor(Role.ATTN_NORM, layer, "weight", (h,))
        yield from linear(Role.Q, q, h, self.qkv_bias)
        yield from linear(Role.K, k, h, self.qkv_bias)
        yield from linear(Role.V, k, h, self.qkv_bias)
        if self.qk_norm:
            yield Tensor(Role.Q_NORM, layer, "weight", (d,))
            yield Tensor(Role.K_NORM, layer, "weight", (d,))
        yield from linear(Role.O, h, q, self.o_bias)
        yield Tensor(Role.MLP_NORM, layer, "weight", (h,))
        yield from linear(Role.GATE, i, h, self.mlp_bias)
        yield from linear(Role.UP, i, h, self.mlp_bias)
        yield from linear(Role.DOWN, h, i, self.mlp_bias)

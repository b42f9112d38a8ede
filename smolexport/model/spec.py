"""What a decoder is: sizes, layers, and every tensor that must exist, as plain data.

Whatever differs from layer to layer is in `Layer`, so that no converter or runtime needs to know the family of a model.

Notation: h = hidden_size, i = intermediate_size, d = head_dim, q = num_attention_heads,
k = num_key_value_heads, v = vocab_size.  Matrices are [out, in].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from math import prod
from operator import attrgetter

from smolexport.model.rope import Rope
from smolexport.text import few


class Role(Enum):
    """The place of a tensor in the computation, in the order of the forward pass."""

    EMBED = auto()
    NORM_BEFORE_ATTENTION = auto()
    Q = auto()
    K = auto()
    V = auto()
    Q_NORM = auto()
    K_NORM = auto()
    O = auto()  # noqa: E741
    NORM_BEFORE_MLP = auto()
    GATE = auto()
    UP = auto()
    DOWN = auto()
    FINAL_NORM = auto()
    HEAD = auto()


# Names of the modules in reports, statistics and ONNX graphs, `{}` = layer.  Most checkpoints use the same names;
# `ModelSpec.sources` holds the exceptions.
NAMES: Mapping[Role, str] = {
    Role.EMBED: "model.embed_tokens",
    Role.NORM_BEFORE_ATTENTION: "model.layers.{}.input_layernorm",
    Role.Q: "model.layers.{}.self_attn.q_proj",
    Role.K: "model.layers.{}.self_attn.k_proj",
    Role.V: "model.layers.{}.self_attn.v_proj",
    Role.Q_NORM: "model.layers.{}.self_attn.q_norm",
    Role.K_NORM: "model.layers.{}.self_attn.k_norm",
    Role.O: "model.layers.{}.self_attn.o_proj",
    Role.NORM_BEFORE_MLP: "model.layers.{}.post_attention_layernorm",
    Role.GATE: "model.layers.{}.mlp.gate_proj",
    Role.UP: "model.layers.{}.mlp.up_proj",
    Role.DOWN: "model.layers.{}.mlp.down_proj",
    Role.FINAL_NORM: "model.norm",
    Role.HEAD: "lm_head",
}


@dataclass(frozen=True)
class Source:
    """How a checkpoint stores a tensor.

    Attributes:
        name: of the tensor in the checkpoint; in `ModelSpec.sources`, of its module with `{}` for the layer.  Tensors
            that share a name are fused: their rows follow each other in the order of the spec.
        transposed: matrices are stored [in, out].
        added: constant added to each weight on reading.
    """

    name: str
    transposed: bool = False
    added: float = 0.0


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model.

    Attributes:
        role: its place in the computation.
        index: the layer, and further indices of its role; empty outside the layers.
        part: `weight` or `bias`.
        shape: [out, in] or [n].
        source: how the checkpoint stores it; without a name for a tensor of an exported file.
    """

    role: Role
    index: tuple[int, ...]
    part: str
    shape: tuple[int, ...]
    source: Source = field(default=Source(""), compare=False, repr=False)

    @property
    def key(self) -> tuple[Role, tuple[int, ...], str]:
        """Its identity apart from the shape."""
        return self.role, self.index, self.part

    @property
    def layer(self) -> int | None:
        """Number of its layer; None outside the layers."""
        return self.index[0] if self.index else None

    @property
    def name(self) -> str:
        """Its name in smolexport, unique in a model and the same for every architecture."""
        return f"{NAMES[self.role].format(*self.index)}.{self.part}"

    @property
    def stored_name(self) -> str:
        """Its name in the checkpoint, which fused tensors share."""
        return self.source.name or self.name

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows; a vector counts as a single one."""
        return len(self.shape) > 1

    @property
    def rows(self) -> int:
        """Number of rows; 1 for a vector."""
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[-1]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention.

    Attributes:
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        head_dim: elements of a head.
        rope: rotary embedding; None = no rotation (NoPE).
        window: positions that a token attends to, itself included; None = all before it.
        qkv_bias: biases on the query, key and value projections.
        o_bias: bias on the output projection.
        qk_norm: RMS normalization of each query and key head.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope | None
    window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class Mlp:
    """Gated feed-forward: down(activation(gate(x)) up(x))."""

    intermediate_size: int
    activation: str = "silu"
    bias: bool = False


@dataclass(frozen=True)
class Layer:
    """One block: x + mixer(norm(x)), then x + mlp(norm(x)), with RMS norms."""

    mixer: Attention
    mlp: Mlp


@dataclass(frozen=True)
class ModelSpec:
    """A decoder.

    Attributes:
        model_type: its architecture.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        layers: in the order of the forward pass.
        tied: the embedding is the head.
        norm_eps: of all norms.
        context_length: positions that it was trained for.
        sources: exceptions of the checkpoint from `NAMES`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    tied: bool
    norm_eps: float
    context_length: int
    sources: Mapping[Role, Source] = field(default_factory=dict, hash=False)

    @property
    def attention(self) -> Attention:
        """The first layer's attention, for files that hold one set of sizes (see `departures`)."""
        return self.layers[0].mixer

    @property
    def rope(self) -> Rope | None:
        """The first rotary embedding; None when no layer has one."""
        return next((layer.mixer.rope for layer in self.layers if layer.mixer.rope is not None), None)

    def source(self, role: Role, *index: int, part: str = "weight") -> Source:
        """How the checkpoint stores the tensor."""
        found = self.sources.get(role) or Source(NAMES[role])
        name = f"{found.name.format(*index)}.{part}"
        return replace(found, name=name) if part == "weight" else Source(name)

    @property
    def rearranged(self) -> list[str]:
        """Modules of the checkpoint whose tensors are transposed, shifted or fused."""
        kept = list(self.sources.values())
        return [source.name for source in kept if source.transposed or source.added or kept.count(source) > 1]

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that must exist, in the order of the forward pass.  A tied head is not listed."""
        h, v = self.hidden_size, self.vocab_size
        yield self._tensor(Role.EMBED, (v, h))
        for number, layer in enumerate(self.layers):
            yield from self._layer_tensors(layer, number)
        yield self._tensor(Role.FINAL_NORM, (h,))
        if not self.tied:
            yield self._tensor(Role.HEAD, (v, h))

    def _tensor(self, role: Role, shape: tuple[int, ...], *index: int, part: str = "weight") -> Tensor:
        return Tensor(role, index, part, shape, self.source(role, *index, part=part))

    def _layer_tensors(self, layer: Layer, number: int) -> Iterator[Tensor]:
        a, h, i = layer.mixer, self.hidden_size, layer.mlp.intermediate_size
        q, k = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim

        def linear(role: Role, out: int, columns: int, bias: bool) -> Iterator[Tensor]:
            yield self._tensor(role, (out, columns), number)
            if bias:
                yield self._tensor(role, (out,), number, part="bias")

        yield self._tensor(Role.NORM_BEFORE_ATTENTION, (h,), number)
        yield from linear(Role.Q, q, h, a.qkv_bias)
        yield from linear(Role.K, k, h, a.qkv_bias)
        yield from linear(Role.V, k, h, a.qkv_bias)
        if a.qk_norm:
            yield self._tensor(Role.Q_NORM, (a.head_dim,), number)
            yield self._tensor(Role.K_NORM, (a.head_dim,), number)
        yield from linear(Role.O, h, q, a.o_bias)
        yield self._tensor(Role.NORM_BEFORE_MLP, (h,), number)
        yield from linear(Role.GATE, i, h, layer.mlp.bias)
        yield from linear(Role.UP, i, h, layer.mlp.bias)
        yield from linear(Role.DOWN, h, i, layer.mlp.bias)


def stored_shape(parts: Sequence[Tensor]) -> tuple[int, ...]:
    """The shape of the checkpoint's tensor that consists of `parts`."""
    shape = (sum(tensor.shape[0] for tensor in parts), *parts[0].shape[1:])
    return shape[::-1] if parts[0].source.transposed else shape


ONE_SIZE = ("mixer.num_attention_heads", "mixer.num_key_value_heads", "mixer.head_dim", "mlp.intermediate_size")


def departures(spec: ModelSpec, computed: Mapping[str, tuple[object, ...]]) -> Iterator[str]:
    """A phrase, with both values, for each field of `spec` that a target does not support.

    `computed`: field of a layer, such as `mixer.window` -> the supported values.  The sizes of heads and feed-forward
    must be equal on all layers in any case.
    """
    if not spec.layers:
        yield "has at least one layer, the checkpoint has none"
        return
    one = {path: (attrgetter(path)(spec.layers[0]),) for path in ONE_SIZE}
    for path, values in (*one.items(), *computed.items()):
        found = {number: attrgetter(path)(layer) for number, layer in enumerate(spec.layers)}
        odd = [number for number, value in found.items() if value not in values]
        if odd:
            where = "" if len(odd) == len(found) else f" on {'layer' if len(odd) == 1 else 'layers'} {few(odd, 4)}"
            due = " or ".join(map(_shown, values))
            name = path.removeprefix("mixer.").replace(".", " ")
            yield f"has {name} {due}, the checkpoint has {_shown(found[odd[0]])}{where}"


def _shown(value: object) -> str:
    return "none" if value is None else str(value).lower()

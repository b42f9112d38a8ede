"""The graph of a decoder, from `ModelSpec` and `Layer` alone.

Facts about the operators: `docs/ContribOperators.md` of ONNX Runtime 1.31 and runs of it.

Notation: b = batch, s = tokens of this call, t = tokens so far with these, h = hidden_size, v = vocab_size,
q, k = numbers of query and key heads, d = head_dim.  Activations are [b, s, …].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto, ValueInfoProto
from onnx.helper import make_attribute, make_opsetid, make_tensor_value_info

from smolexport.model.rope import Rope
from smolexport.model.spec import NAMES, Attention, Mlp, ModelSpec, Role
from smolexport.quant.planar import MIDDLE, ChannelFormat
from smolexport_to_onnx.architectures import ROTARY_UNIT, rotated_apart
from smolexport_to_onnx.container import DTYPES, GATE_UP, KEEP, QKV, Layout
from smolexport_to_onnx.schemes import Dtype, packing_of

LAST = (1 << 63) - 1
TOP, TINY = 127.0, 1e-30  # steps of activations either way; the smallest largest magnitude
IR_VERSION, OPSET = 10, 21
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Settings:
    """Options of the graph: `dtype` of activations and caches, `logits` of all positions of a call or the last one.

    At `accuracy_level` 4 MatMulNBits rounds activations to 8 bits per block, at 0 it does not.
    """

    dtype: Dtype
    accuracy_level: int = 4
    logits: Literal["all", "last"] = "all"


@dataclass
class Builder:
    """A graph that grows: nodes in order of execution, small constants, and names for both."""

    layout: Layout
    settings: Settings
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def add(
        self,
        op: str,
        scope: str,
        *inputs: str,
        outputs: tuple[str, ...] = (),
        domain: str = "",
        **attributes: float | str | tuple[int, ...],
    ) -> str:
        """Append an operator; returns its first output, named after the scope unless `outputs` says otherwise."""
        name = f"{scope}/{op}"
        made = outputs or (f"{name}/output_0",)
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        named = [make_attribute(key, value) for key, value in attributes.items()]
        self.nodes.append(NodeProto(op_type=op, input=inputs, output=made, name=name, domain=domain, attribute=named))
        return made[0]

    def integers(self, *values: int) -> str:
        """The name of a constant of int64."""
        return self.constant(f"list.{'.'.join(map(str, values))}", "I64", np.array(values, "<i8"))

    def constant(self, name: str, dtype: str, value: NDArray[Any]) -> str:
        """The name of a constant inside the graph."""
        content = value.tobytes()
        self.constants[name] = TensorProto(name=name, data_type=DTYPES[dtype], dims=value.shape, raw_data=content)
        return name

    def number(self, value: float) -> str:
        """The name of a constant of the activations' type."""
        name, kind = f"number.{value:g}", "<f4" if self.settings.dtype == "F32" else "<f2"
        return self.constant(name, self.settings.dtype, np.array(value, kind))

    def byte(self, value: int) -> str:
        """The name of a constant of uint8."""
        return self.constant(f"byte.{value}", "U8", np.array(value, np.uint8))

    def every_row(self) -> str:
        """The input for the number of last rows of logits to compute; all, which is 0, if it is not fed."""
        return self.constant(KEEP, "I64", np.array(0, "<i8"))

    def linear(self, module: str, scope: str, x: str) -> str:
        """`x` [b, s, columns] times the transposed matrix of `module`, plus its bias; [b, s, rows]."""
        matrix = self.layout.modules[f"{module}.weight"]
        form = packing_of(matrix.format)
        if form is None:  # transposed once, when a session begins: not every device has FusedMatMul
            y = self.add("MatMul", scope, x, self.add("Transpose", scope, matrix.name, perm=(1, 0)))
        elif isinstance(form, ChannelFormat):
            y = self._integer_product(module, scope, x)
        else:
            zeros = "" if form.symmetric else f"{module}.zero_points"
            y = self.add(
                "MatMulNBits", scope, x, f"{module}.B", f"{module}.scales", zeros, domain=MICROSOFT,
                K=matrix.columns or 0, N=matrix.rows, bits=form.bits, block_size=form.group,
                accuracy_level=self.settings.accuracy_level,
            )  # fmt: skip
        bias = f"{module}.bias"
        return self.add("Add", scope, y, bias) if bias in self.layout.modules else y

    def embedding(self, module: str, ids: str) -> str:
        """The rows of `module` at `ids` [b, s]; [b, s, h].  Packed ones by basic operators, which every runtime has."""
        scope, form = "/model/embed_tokens", packing_of(self.layout.modules[f"{module}.weight"].format)
        if form is None:
            return self.add("Gather", scope, f"{module}.weight", ids, axis=0)
        if isinstance(form, ChannelFormat):
            return self._transposed_embedding(module, scope, ids)
        codes = self.add("Gather", scope, f"{module}.B", ids, axis=0)  # [b, s, blocks, bytes]
        if form.bits == 4:
            codes = self._nibbles(scope, codes)
        kind = {"F32": 1, "F16": 10}[self.settings.dtype]
        zero = self.number(float(1 << form.bits - 1))
        centred = self.add("Sub", scope, self.add("Cast", scope, codes, to=kind), zero)
        scales = self.add("Gather", f"{scope}/scales", f"{module}.scales", ids, axis=0)
        scales = self.add("Unsqueeze", f"{scope}/scales", scales, self.integers(-1))
        return self.add("Reshape", scope, self.add("Mul", scope, centred, scales), self.integers(0, 0, -1))

    def _integer_product(self, module: str, scope: str, x: str) -> str:
        """Like `linear`, of integers: each position's activations are rounded to 127 steps of their own either way.

        A scale of all positions together, which DynamicQuantizeLinear makes, would let one with large activations
        spoil the others, and a text's logits depend on how it is cut into calls.  Both sides are unsigned around 128:
        unsigned times signed saturates on processors without VNNI, signed times signed has no fast kernel.
        """
        largest = self.add("ReduceMax", scope, self.add("Abs", scope, x), self.integers(-1), keepdims=1)
        steps = self.add("Div", f"{scope}/steps", self.number(TOP), self.add("Max", scope, largest, self.number(TINY)))
        middle = self.byte(MIDDLE)
        codes = self.add("QuantizeLinear", scope, self.add("Mul", f"{scope}/steps", x, steps), self.number(1), middle)
        sums = self.add("Cast", scope, self.add("MatMulInteger", scope, codes, f"{module}.B", middle, middle), to=1)
        return self.add("Div", scope, self.add("Mul", scope, sums, f"{module}.scales"), steps)

    def _transposed_embedding(self, module: str, scope: str, ids: str) -> str:
        codes = self.add("Transpose", scope, self.add("Gather", scope, f"{module}.B", ids, axis=1), perm=(1, 2, 0))
        centred = self.add("Sub", scope, self.add("Cast", scope, codes, to=1), self.number(MIDDLE))
        scales = self.add("Gather", f"{scope}/scales", f"{module}.scales", ids, axis=0)
        return self.add("Mul", scope, centred, self.add("Unsqueeze", f"{scope}/scales", scales, self.integers(-1)))

    def _nibbles(self, scope: str, pairs: str) -> str:
        """Codes [b, s, blocks, elements], a byte each, from bytes that hold two: the first in the lower half."""
        low = self.add("BitwiseAnd", scope, pairs, self.byte(15))
        high = self.add("BitShift", scope, pairs, self.byte(4), direction="RIGHT")
        halves = (
            self.add("Unsqueeze", f"{scope}/{name}", half, self.integers(-1))
            for name, half in (("low", low), ("high", high))
        )
        apart = self.add("Concat", scope, *halves, axis=-1)
        return self.add("Reshape", f"{scope}/codes", apart, self.integers(0, 0, 0, -1))


def build(spec: ModelSpec, layout: Layout, settings: Settings, metadata: Mapping[str, str]) -> ModelProto:
    """The graph of `spec` over the arrays of `layout`.

    Of attention_mask only the number of ones in a row counts: padding belongs on the right.
    """
    b = Builder(layout, settings)
    lengths = _lengths(b, spec)
    embed = NAMES[Role.EMBED]
    hidden = b.embedding(embed, "input_ids")
    name, epsilon = f"{NAMES[Role.NORM_BEFORE_ATTENTION].format(0)}.weight", spec.norm_eps
    normed = b.add(
        "SimplifiedLayerNormalization", "/model/layers.0/input_layernorm", hidden, name,
        axis=-1, epsilon=epsilon, stash_type=1,
    )  # fmt: skip
    for number, layer in enumerate(spec.layers):
        scope, final = f"/model/layers.{number}", number + 1 == len(spec.layers)
        after = NAMES[Role.FINAL_NORM if final else Role.NORM_BEFORE_ATTENTION].format(number + 1)
        attended = _attention(b, layer.mixer, epsilon, number, normed, lengths)
        if final:
            attended, hidden = _kept(b, attended, hidden)
        attended = b.linear(NAMES[Role.O].format(number), f"{scope}/attn/o_proj", attended)
        norm = NAMES[Role.NORM_BEFORE_MLP].format(number)
        normed, hidden = _skip_norm(b, f"{scope}/post_attention_layernorm", hidden, attended, norm, epsilon)
        fed = _feed_forward(b, layer.mlp, number, normed)
        normed, hidden = _skip_norm(b, f"/{after.replace('.', '/', 1)}", hidden, fed, after, epsilon)
    _head(b, embed if spec.tied else NAMES[Role.HEAD], normed)
    graph = GraphProto(
        node=b.nodes,
        name="decoder",
        initializer=(*_initializers(layout), *b.constants.values()),
        input=_inputs(spec, settings),
        output=_outputs(spec, settings),
    )
    return ModelProto(
        ir_version=IR_VERSION,
        producer_name="smolexport",
        producer_version=metadata.get("smolexport.version", ""),
        graph=graph,
        opset_import=(make_opsetid("", OPSET), make_opsetid(MICROSOFT, 1)),
        metadata_props=_pairs(metadata),
    )


def _initializers(layout: Layout) -> Iterator[TensorProto]:
    location = layout.data.removeprefix("onnx/")
    for array in layout.arrays.values():
        place = {"location": location, "offset": array.offset, "length": array.nbytes}
        yield TensorProto(
            name=array.name, data_type=DTYPES[array.dtype], dims=array.shape, external_data=_pairs(place),
            data_location=TensorProto.EXTERNAL,
        )  # fmt: skip


def _pairs(strings: Mapping[str, object]) -> list[StringStringEntryProto]:
    return [StringStringEntryProto(key=key, value=str(value)) for key, value in strings.items()]


def _lengths(b: Builder, spec: ModelSpec) -> tuple[str, str, str]:
    """Names of inputs of attention: t - 1 of each sequence [b], t, and the first position of this call [1]."""
    scope = "/model/attn_mask"
    summed = b.add("ReduceSum", scope, "attention_mask", b.integers(1), keepdims=0)
    last = b.add("Cast", f"{scope}/last", b.add("Sub", scope, summed, b.integers(1)), to=6)
    shape = b.add("Shape", scope, "attention_mask", start=1, end=2)  # [t]
    total = b.add("Squeeze", scope, b.add("Cast", f"{scope}/total", shape, to=6), b.integers(0))
    if not rotated_apart(spec):
        return last, total, ""
    here = b.add("Shape", f"{scope}/here", "input_ids", start=1, end=2)
    return last, total, b.add("Sub", f"{scope}/start", shape, here)


def _attention(b: Builder, a: Attention, epsilon: float, number: int, x: str, lengths: tuple[str, str, str]) -> str:
    """Attention up to its output projection; `x` [b, s, h], the result [b, s, q d]."""
    scope = f"/model/layers.{number}/attn"
    last, total, start = lengths
    packed = b.linear(QKV.format(number), f"{scope}/qkv_proj", x)
    query, key, value = packed, "", ""
    tables: tuple[str, ...] = ()
    apart = a.rope is not None and a.head_dim % ROTARY_UNIT != 0
    if a.qk_norm or apart:
        query, key, value = _split(b, a, scope, packed)
    if a.qk_norm:
        query = _head_norm(b, f"{scope}/q_norm", query, Role.Q_NORM, number, a, epsilon)
        key = _head_norm(b, f"{scope}/k_norm", key, Role.K_NORM, number, a, epsilon)
    if a.rope is not None:
        tables = _tables(b, a.rope)
    if apart:
        query, key = (
            b.add("RotaryEmbedding", f"{scope}/{part}_rotary", rows, start, *tables, domain=MICROSOFT)
            for part, rows in (("q", query), ("k", key))
        )
        tables = ()
    past = (f"past_key_values.{number}.key", f"past_key_values.{number}.value")
    return b.add(
        "GroupQueryAttention", scope, query, key, value, *past, last, total, *tables,
        outputs=(f"{scope}/output_0", f"present.{number}.key", f"present.{number}.value"), domain=MICROSOFT,
        num_heads=a.num_attention_heads, kv_num_heads=a.num_key_value_heads,
        scale=float(a.head_dim**-0.5), do_rotary=int(bool(tables)), rotary_interleaved=0,
        local_window_size=-1 if a.window is None else a.window,
    )  # fmt: skip


def _split(b: Builder, a: Attention, scope: str, packed: str) -> tuple[str, str, str]:
    """Queries [b, s, q d], keys and values [b, s, k d]."""
    names = (f"{scope}/query", f"{scope}/key", f"{scope}/value")
    heads = (a.num_attention_heads, a.num_key_value_heads, a.num_key_value_heads)
    b.add("Split", scope, packed, b.integers(*(n * a.head_dim for n in heads)), outputs=names, axis=-1)
    return names


def _head_norm(b: Builder, scope: str, x: str, role: Role, number: int, a: Attention, epsilon: float) -> str:
    """RMS normalization of every head of `x` [b, s, heads d] in layer `number`."""
    weight = f"{NAMES[role].format(number)}.weight"
    heads = b.add("Reshape", f"{scope}/heads", x, b.integers(0, 0, -1, a.head_dim))
    normed = b.add("SimplifiedLayerNormalization", scope, heads, weight, axis=-1, epsilon=epsilon, stash_type=1)
    return b.add("Reshape", scope, normed, b.integers(0, 0, -1))


def _tables(b: Builder, rope: Rope) -> tuple[str, str]:
    cos, sin = (table.name for table in b.layout.tables if table.rope == rope)
    return cos, sin


def _feed_forward(b: Builder, mlp: Mlp, number: int, x: str) -> str:
    """down(silu(gate(x)) up(x)); `x` and the result [b, s, h]."""
    scope = f"/model/layers.{number}/mlp"
    gate, up = f"{scope}/gate", f"{scope}/up"
    packed = b.linear(GATE_UP.format(number), f"{scope}/gate_up_proj", x)
    size = mlp.intermediate_size
    b.add("Split", scope, packed, b.integers(size, size), outputs=(gate, up), axis=-1)
    active = b.add("Mul", f"{scope}/act", gate, b.add("Sigmoid", scope, gate))
    return b.linear(NAMES[Role.DOWN].format(number), f"{scope}/down_proj", b.add("Mul", scope, active, up))


def _skip_norm(b: Builder, scope: str, hidden: str, added: str, norm: str, epsilon: float) -> tuple[str, str]:
    """hidden + added, normalised and as it is."""
    normed, total = f"{scope}/output_0", f"{scope}/output_3"
    b.add(
        "SkipSimplifiedLayerNormalization", scope, hidden, added, f"{norm}.weight",
        outputs=(normed, "", "", total), domain=MICROSOFT, epsilon=epsilon,
    )  # fmt: skip
    return normed, total


def _kept(b: Builder, *parts: str) -> tuple[str, ...]:
    """The rows of the last layer's `parts` [b, s, ...] whose logits are requested.

    Once keys and values are stored, only they need the rest of the model.
    """
    scope = "/model/kept"
    start = b.integers(-1)
    if b.settings.logits == "all":
        start = b.add("Unsqueeze", scope, b.add("Neg", scope, b.every_row()), b.integers(0))
    return tuple(
        b.add("Slice", f"{scope}/{number}", part, start, b.integers(LAST), b.integers(1))
        for number, part in enumerate(parts)
    )


def _head(b: Builder, module: str, x: str) -> None:
    """Logits, always float32."""
    scope = "/lm_head"
    logits = b.linear(module, scope, x)
    if b.settings.dtype == "F32":
        b.nodes[-1].output[:] = ["logits"]
    else:
        b.add("Cast", scope, logits, outputs=("logits",), to=1)


def _port(name: str, dtype: str, *shape: int | str) -> ValueInfoProto:
    """An input or output; a text in the shape is a size that the caller chooses."""
    return make_tensor_value_info(name, DTYPES[dtype], shape)


def _caches(spec: ModelSpec, dtype: Dtype, prefix: str, length: str) -> list[ValueInfoProto]:
    return [
        _port(
            f"{prefix}.{number}.{part}", dtype, "batch_size", layer.mixer.num_key_value_heads, length,
            layer.mixer.head_dim,
        )
        for number, layer in enumerate(spec.layers)
        for part in ("key", "value")
    ]  # fmt: skip


def _inputs(spec: ModelSpec, settings: Settings) -> tuple[ValueInfoProto, ...]:
    # An input with an initializer of its name may be left out, and most callers do not know it.
    keep = (_port(KEEP, "I64"),) if settings.logits == "all" else ()
    return (
        _port("input_ids", "I64", "batch_size", "sequence_length"),
        _port("attention_mask", "I64", "batch_size", "total_sequence_length"),
        *_caches(spec, settings.dtype, "past_key_values", "past_sequence_length"),
        *keep,
    )


def _outputs(spec: ModelSpec, settings: Settings) -> tuple[ValueInfoProto, ...]:
    length: int | str = 1 if settings.logits == "last" else "kept_length"
    return (
        _port("logits", "F32", "batch_size", length, spec.vocab_size),
        *_caches(spec, settings.dtype, "present", "total_sequence_length"),
    )


def serialize(message: Any) -> bytes:
    """The bytes of a protobuf message: as its library writes it, but with all lists of integers packed.

    The library leaves `dims` and `ints` unpacked and omits a shape without axes; all readers accept both.
    """
    fields: dict[Any, Any] = dict(message.ListFields())
    if "dims" in message.DESCRIPTOR.fields_by_name:
        fields = {message.DESCRIPTOR.fields_by_name["dims"]: message.dims, **fields}
    parts = []
    for key, value in fields.items():
        if key.message_type is not None:
            inner = map(serialize, value if hasattr(value, "append") else (value,))
            parts += [_framed(key.number, content) for content in inner]
        elif hasattr(value, "append") and key.type == key.TYPE_INT64:
            parts.append(_framed(key.number, b"".join(map(_varint, value))))
        else:
            parts.append(type(message)(**{key.name: value}).SerializeToString())
    return b"".join(parts)


def _framed(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """`value` in groups of seven bits, the lowest first; a negative number as its 64-bit two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])

"""An ONNX model as plain data, and its protobuf form: the part of onnx.proto3 that a decoder's graph is made of.

Written by hand because the library costs what a whole export may: 50 MB and a second to import.  Facts: onnx.proto3
of ONNX 1.23 (field numbers, element types).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from smolexport.errors import FileFormatError
from smolexport.text import show
from smolexport_to_onnx import wire
from smolexport_to_onnx.wire import Value, WireError, bytes_field, float_field, int_field, packed

__all__ = ["DTYPES", "SIZES", "External", "Graph", "Initializer", "Node", "Port", "decode", "encode", "read_graph"]

IR_VERSION, OPSET = 10, 21
MICROSOFT = "com.microsoft"
# Element types under the names of safetensors.
DTYPES: Mapping[str, int] = {"F32": 1, "U8": 2, "I8": 3, "I32": 6, "I64": 7, "BOOL": 9, "F16": 10, "BF16": 16}
NAMES: Mapping[int, str] = {number: name for name, number in DTYPES.items()}
SIZES: Mapping[str, int] = {"F32": 4, "U8": 1, "I8": 1, "I32": 4, "I64": 8, "BOOL": 1, "F16": 2, "BF16": 2}
MAX_GRAPH = 64 << 20  # a graph of this package is about 100 kB; beyond this there are weights inside
MOST_FIELDS = 1 << 20  # of all messages in it
MAX_AXES, MAX_NAME = 8, 500
FLOAT, INT, STRING, INTS = 1, 2, 3, 7
Attribute = int | float | str | tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One operator.  An input or output that is left out is an empty name."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str = ""
    domain: str = ""
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


@dataclass(frozen=True)
class Port:
    """An input or output of the graph; a text in the shape is a size that the caller chooses."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class External:
    """Bytes [offset, offset + length) of the file `location` beside the graph."""

    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class Initializer:
    """A constant: its bytes, or the place where they lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: bytes | External

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * SIZES.get(self.dtype, 0)


@dataclass(frozen=True)
class Graph:
    """A model: its operators in order of execution, constants, inputs, outputs, and strings about it."""

    nodes: tuple[Node, ...]
    initializers: tuple[Initializer, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    producer: tuple[str, str] = ("", "")


def encode(graph: Graph) -> bytes:
    """The file's content; the same graph gives the same bytes."""
    body = b"".join(
        (
            *(bytes_field(1, _node(node)) for node in graph.nodes),
            bytes_field(2, "decoder"),
            *(bytes_field(5, _initializer(initializer)) for initializer in graph.initializers),
            *(bytes_field(11, _port(port)) for port in graph.inputs),
            *(bytes_field(12, _port(port)) for port in graph.outputs),
        )
    )
    opsets = (("", OPSET), (MICROSOFT, 1))
    return b"".join(
        (
            int_field(1, IR_VERSION),
            bytes_field(2, graph.producer[0]),
            bytes_field(3, graph.producer[1]),
            bytes_field(7, body),
            *(bytes_field(8, bytes_field(1, domain) + int_field(2, version)) for domain, version in opsets),
            *(bytes_field(14, _pair(key, value)) for key, value in graph.metadata.items()),
        )
    )


def _pair(key: str, value: str) -> bytes:
    return bytes_field(1, key) + bytes_field(2, value)


def _node(node: Node) -> bytes:
    return b"".join(
        (
            *(bytes_field(1, name) for name in node.inputs),
            *(bytes_field(2, name) for name in node.outputs),
            bytes_field(3, node.name),
            bytes_field(4, node.op),
            *(bytes_field(5, _attribute(name, value)) for name, value in node.attributes.items()),
            bytes_field(7, node.domain),
        )
    )


def _attribute(name: str, value: Attribute) -> bytes:
    match value:
        case int():
            kind, content = INT, int_field(3, value)
        case float():
            kind, content = FLOAT, float_field(2, value)
        case str():
            kind, content = STRING, bytes_field(4, value)
        case _:
            kind, content = INTS, packed(8, value)
    return bytes_field(1, name) + content + int_field(20, kind)


def _initializer(initializer: Initializer) -> bytes:
    head = packed(1, initializer.shape) + int_field(2, DTYPES[initializer.dtype]) + bytes_field(8, initializer.name)
    content = initializer.content
    if isinstance(content, bytes):
        return head + bytes_field(9, content)
    pairs = {"location": content.location, "offset": str(content.offset), "length": str(content.length)}
    return head + b"".join(bytes_field(13, _pair(*pair)) for pair in pairs.items()) + int_field(14, 1)


def _port(port: Port) -> bytes:
    sizes = (int_field(1, size) if isinstance(size, int) else bytes_field(2, size) for size in port.shape)
    shape = b"".join(bytes_field(1, size) for size in sizes)
    tensor = int_field(1, DTYPES[port.dtype]) + bytes_field(2, shape)
    return bytes_field(1, port.name) + bytes_field(2, bytes_field(1, tensor))


def read_graph(path: Path) -> Graph:
    """The graph in the file `path`; no weight is read.

    Raises:
        FileFormatError: missing, damaged, or larger than a graph with its weights beside it ever is.
    """
    try:
        if path.stat().st_size > MAX_GRAPH:
            raise FileFormatError(
                f"{path}: {path.stat().st_size >> 20} MiB; a graph with its weights beside it is far smaller"
            )
        data = path.read_bytes()
    except OSError as error:
        raise FileFormatError(f"{path}: {error.strerror or error}") from error
    try:
        return decode(data)
    except WireError as error:
        raise FileFormatError(f"{path}: is damaged or no ONNX file ({error})") from error


def decode(data: bytes) -> Graph:
    """The graph that `data` holds; raises WireError when it holds none."""
    return _Decoder().model(data)


Fields = dict[int, list[Value]]


class _Decoder:
    """Reads one file, whose fields it counts: a field of two bytes becomes hundreds in memory."""

    def __init__(self) -> None:
        self._left = MOST_FIELDS

    def model(self, data: bytes) -> Graph:
        parts = self.collect(data)
        bodies = parts.get(7, [])
        if not bodies:
            raise WireError("there is no graph in it")
        body = self.collect(bodies[-1])
        metadata = (self.strings(value) for value in parts.get(14, ()))
        return Graph(
            tuple(map(self.node, body.get(1, ()))),
            tuple(map(self.initializer, body.get(5, ()))),
            tuple(map(self.port, body.get(11, ()))),
            tuple(map(self.port, body.get(12, ()))),
            dict(metadata),
            (_text(parts, 2), _text(parts, 3)),
        )

    def spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise WireError(f"more than {MOST_FIELDS:,} fields, which no decoder's graph has")

    def collect(self, value: Value) -> Fields:
        """The fields of the message `value`, by their numbers."""
        if isinstance(value, int):
            raise WireError("a number where a message belongs")
        found: Fields = {}
        for number, content in wire.fields(value):
            self.spend(1)
            found.setdefault(number, []).append(content)
        return found

    def integers(self, parts: Fields, number: int) -> tuple[int, ...]:
        values = parts.get(number, ())
        self.spend(sum(len(value) for value in values if not isinstance(value, int)))
        return tuple(integer for value in values for integer in wire.integers(value))

    def strings(self, value: Value) -> tuple[str, str]:
        parts = self.collect(value)
        return _text(parts, 1), _text(parts, 2)

    def node(self, value: Value) -> Node:
        parts = self.collect(value)
        attributes = {}
        for part in parts.get(5, ()):
            name, content = self.attribute(self.collect(part))
            if content is not None:
                attributes[name] = content
        inputs, outputs = (tuple(map(wire.text, parts.get(number, ()))) for number in (1, 2))
        return Node(_text(parts, 4), inputs, outputs, _text(parts, 3), _text(parts, 7), attributes)

    def attribute(self, parts: Fields) -> tuple[str, Attribute | None]:
        """Name and value; None for kinds that no operator here has."""
        name = _text(parts, 1)
        match _int(parts, 20):
            case 1:
                data = _bytes(parts, 2)
                if len(data) != 4:
                    raise WireError("a float of another size")
                return name, float(struct.unpack("<f", data)[0])
            case 2:
                return name, _int(parts, 3)
            case 3:
                return name, _text(parts, 4)
            case 7:
                return name, self.integers(parts, 8)
        return name, None

    def initializer(self, value: Value) -> Initializer:
        parts = self.collect(value)
        name, kind, shape = _text(parts, 8), _int(parts, 2), self.integers(parts, 1)
        if not name.isprintable() or len(name) > MAX_NAME:
            raise WireError("a constant without a readable name")
        if any(size < 0 for size in shape) or len(shape) > MAX_AXES:
            raise WireError(f"the constant {show(name)} has the shape {list(shape[: MAX_AXES + 1])}")
        dtype = NAMES.get(kind, f"type {kind}")
        if _int(parts, 14) == 1:
            return Initializer(name, dtype, shape, _external(name, dict(map(self.strings, parts.get(13, ())))))
        return Initializer(name, dtype, shape, _bytes(parts, 9))

    def port(self, value: Value) -> Port:
        parts = self.collect(value)
        kind = self.last(parts, 2)
        tensor = self.last(kind, 1)
        shape: list[int | str] = []
        for axis in self.last(tensor, 2).get(1, ()):
            size = self.collect(axis)
            shape.append(_int(size, 1) if 1 in size else _text(size, 2))
        number = _int(tensor, 1)
        return Port(_text(parts, 1), NAMES.get(number, f"type {number}"), tuple(shape))

    def last(self, parts: Fields, number: int) -> Fields:
        """The last message of that number, which is the one that counts; empty without any."""
        return self.collect(parts[number][-1]) if number in parts else {}


def _bytes(parts: Fields, number: int) -> bytes:
    value = parts[number][-1] if number in parts else b""
    if isinstance(value, int):
        raise WireError("a number where bytes belong")
    return value


def _text(parts: Fields, number: int) -> str:
    return wire.text(parts[number][-1]) if number in parts else ""


def _int(parts: Fields, number: int) -> int:
    value = parts[number][-1] if number in parts else 0
    if not isinstance(value, int):
        raise WireError("text where a number belongs")
    return wire.to_signed(value)


def _external(name: str, pairs: Mapping[str, str]) -> External:
    def number(key: str) -> int:
        value = pairs.get(key, "0")
        if not (value.isascii() and value.isdecimal() and len(value) < 20):
            raise WireError(f"the constant {show(name)} has the {key} {show(value, 40)}")
        return int(value)

    return External(pairs.get("location", ""), number("offset"), number("length"))

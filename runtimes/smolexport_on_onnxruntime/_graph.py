"""What a graph is made of, read before ONNX Runtime opens it: where its weights lie and how it keeps its caches.

Source of the field numbers: onnx.proto of ONNX 1.23.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from smolexport.errors import FileFormatError, UnsupportedError
from smolexport.files import open_regular
from smolexport.text import label, reason, show
from smolexport_on_onnxruntime._wire import Message, integers, read_message, text

__all__ = ["GraphFacts", "read_graph"]

DOMAINS = {"", "ai.onnx", "com.microsoft"}
BITS: Mapping[int, int] = {
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((7, 11, 13), 64),
    **dict.fromkeys((21, 22), 4),
}  # of one element, by TensorProto.DataType
DEEPEST = 8  # graphs inside a node's attributes
KEYS = {"location", "offset", "length", "checksum"}
# A plain name: the runtime takes others for paths, and one of them for an address in memory.
FILE_NAME = re.compile(r"[\w][\w.+-]*", re.ASCII)
# Operators that rotate, with the places of their tables of cosines and sines [positions, ...] among their inputs.
TABLES: Mapping[str, slice] = {"GroupQueryAttention": slice(7, 9), "RotaryEmbedding": slice(2, 4)}
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"


@dataclass(frozen=True)
class GraphFacts:
    """`layers` attention layers with a cache each; `positions` that the rotary tables reach to, None without any."""

    layers: int
    positions: int | None


@dataclass(frozen=True)
class _Node:
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_graph(path: Path) -> GraphFacts:
    """Check the graph in the file `path` and its weights' places.

    Raises:
        FileFormatError: damaged; weights that lie outside the file's folder or beyond the end of their file; operators
            that are no part of ONNX Runtime.
        UnsupportedError: a cache that GroupQueryAttention cannot write in place.
    """
    try:
        with open_regular(path) as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # a file without a byte cannot be mapped
        raise FileFormatError(f"{path}: cannot be read ({reason(error)})") from error
    try:
        return _read_model(path, read_message(data))
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error


def _read_model(path: Path, model: Message) -> GraphFacts:
    if model.get(25) or model.get(20):
        raise FileFormatError("holds functions or training steps, which no exported decoder does")
    graphs = _messages(model, 7)
    if len(graphs) != 1:
        raise FileFormatError("is damaged, or no ONNX graph")
    nodes: list[_Node] = []
    rows: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for tensor in _walk(graphs[0], nodes, 0):
        dims = integers(tensor, 1)
        if tensor.get(13) or tensor.get(14, [0])[-1]:
            _check_place(path, tensor, dims, sizes)
        if dims:
            rows[text(tensor, 8)] = dims[0]
    return GraphFacts(*_attention(nodes, rows))


def _walk(graph: Message, nodes: list[_Node], depth: int) -> Iterator[Message]:
    """Every tensor of the graph and of those inside it; nodes of the outermost one are added to `nodes`."""
    if graph.get(15):
        raise FileFormatError("holds sparse weights, which no exported decoder does")
    if depth > DEEPEST:
        raise FileFormatError(f"graphs inside graphs, more than {DEEPEST} deep")
    yield from _messages(graph, 5)
    for node in _messages(graph, 1):
        kind, domain = text(node, 4), text(node, 7)
        if domain not in DOMAINS:
            raise FileFormatError(f"the operator {show(kind)} of {show(domain)} is no part of ONNX Runtime")
        if depth == 0:
            nodes.append(_Node(kind, _names(node, 1), _names(node, 2)))
        for attribute in _messages(node, 5):
            if attribute.get(22) or attribute.get(23):
                raise FileFormatError("holds sparse weights, which no exported decoder does")
            yield from _messages(attribute, 5)
            yield from _messages(attribute, 10)
            for inner in (*_messages(attribute, 6), *_messages(attribute, 11)):
                yield from _walk(inner, nodes, depth + 1)


def _check_place(path: Path, tensor: Message, dims: list[int], sizes: dict[str, int]) -> None:
    """Whether a tensor outside the graph lies in a file beside it, from its first byte to its last.

    Args:
        path: of the graph.
        tensor: the message.
        dims: its shape.
        sizes: of files seen before, in bytes.
    """
    name = text(tensor, 8)
    entries = [(text(entry, 1), text(entry, 2)) for entry in _messages(tensor, 13)]
    place = dict(entries)
    if len(place) < len(entries) or not place.keys() <= KEYS or tensor.get(14, [0])[-1] != 1:
        raise FileFormatError(f"the weights {show(name)} are described in a way that is not understood")
    file = place.get("location", "")
    if not FILE_NAME.fullmatch(file):
        raise FileFormatError(f"the weights {show(name)} should lie in a file beside the graph, not in {show(file)}")
    if file not in sizes:
        beside = path.with_name(file)
        if not beside.is_file():
            raise FileFormatError(f"the weights {show(name)} should lie in {label(file)}, which is not there")
        sizes[file] = beside.stat().st_size
    offset, length = (place.get(key, "0") for key in ("offset", "length"))
    if not all(re.fullmatch(r"[0-9]{1,18}", number) for number in (offset, length)):
        raise FileFormatError(f"the weights {show(name)} lie at offset {show(offset)}, length {show(length)}")
    bits = BITS.get(_last_integer(tensor, 2), 0)
    needed = (math.prod(dims) * bits + 7) // 8
    if not bits or any(size < 0 for size in dims) or ("length" in place and int(length) != needed):
        raise FileFormatError(
            f"the weights {show(name)} have {show(length)} bytes, which is not what their shape {show(dims)} needs"
        )
    if int(offset) + needed > sizes[file]:
        raise FileFormatError(
            f"the weights {show(name)} end at byte {int(offset) + needed} of {label(file)}, "
            f"which has {sizes[file]} bytes"
        )


def _attention(nodes: list[_Node], rows: Mapping[str, int]) -> tuple[int, int | None]:
    """(layers, positions), once it is certain that each cache may be written in place.

    That is so where GroupQueryAttention alone reads a past and itself makes the present of the same layer.
    """
    makers = {name: node for node in nodes for name in node.outputs if name}
    readers: dict[str, int] = {}
    for node in nodes:
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    layers = 0
    while PRESENT.format(layers, "key") in makers:
        node = makers[PRESENT.format(layers, "key")]
        pasts, presents = (tuple(n.format(layers, c) for c in ("key", "value")) for n in (PAST, PRESENT))
        in_place = node.kind == "GroupQueryAttention" and node.inputs[3:5] == pasts and node.outputs[1:3] == presents
        if not in_place or any(readers[name] != 1 for name in pasts):
            raise UnsupportedError(f"{presents[0]} is not made in place by GroupQueryAttention, so nothing is rewound")
        layers += 1
    if not layers:
        raise FileFormatError(f"has no output {PRESENT.format(0, 'key')}; is it a decoder with a key/value cache?")
    tables = [name for node in nodes if node.kind in TABLES for name in node.inputs[TABLES[node.kind]]]
    return layers, min((rows[name] for name in tables if name in rows), default=None)


def _messages(message: Message, field: int) -> list[Message]:
    values = message.get(field, ())
    if any(isinstance(value, int) for value in values):
        raise FileFormatError(f"is damaged: field {field} should hold a message")
    return [read_message(value) for value in values if not isinstance(value, int)]


def _names(node: Message, field: int) -> tuple[str, ...]:
    return tuple(text({0: [value]}, 0) for value in node.get(field, ()))


def _last_integer(message: Message, field: int) -> int:
    return (integers(message, field) or [0])[-1]

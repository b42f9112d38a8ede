"""What a graph is made of, read before ONNX Runtime opens it: where its weights lie and how it keeps its caches."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto

from smolexport.errors import FileFormatError, UnsupportedError
from smolexport.protobuf import read_message
from smolexport.text import label, show

DOMAINS = {"", "ai.onnx", "com.microsoft"}
BITS: Mapping[int, int] = {
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((7, 11, 13), 64),
    **dict.fromkeys((21, 22), 4),
}  # of one element, by TensorProto.DataType
DEEPEST = 8  # graphs inside a node's attributes
HIGHEST_RANK = 64  # of any shape
KEYS = {"location", "offset", "length", "checksum"}
# A plain name: the runtime takes others for paths, and one of them for an address in memory.
FILE_NAME = re.compile(r"[\w][\w.+-]{0,254}", re.ASCII)
NUMBER = re.compile(r"[0-9]{1,18}")
# Operators that rotate, with the places of their tables of cosines and sines [positions, ...] among their inputs.
TABLES: Mapping[str, slice] = {"GroupQueryAttention": slice(7, 9), "RotaryEmbedding": slice(2, 4)}
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"


@dataclass(frozen=True)
class GraphFacts:
    """`layers` attention layers with a cache each; `positions` that the rotary tables reach to, None without any."""

    layers: int
    positions: int | None


def read_graph(path: Path) -> GraphFacts:
    """Check the graph in the file `path` and its weights' places.

    Raises:
        FileFormatError: damaged; weights that lie outside the file's folder or beyond the end of their file; operators
            that are not part of ONNX Runtime.
        UnsupportedError: a cache that GroupQueryAttention cannot write in place.
    """
    model = read_message(path, ModelProto)
    try:
        if model.functions or model.training_info:
            raise FileFormatError("holds functions or training steps, which no exported decoder does")
        if not model.HasField("graph"):
            raise FileFormatError("is damaged or not an ONNX file (there is no graph in it)")
        rows: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for tensor in _tensors(model.graph, 0):
            if tensor.external_data or tensor.data_location:
                _check_place(path, tensor, sizes)
            if tensor.dims:
                rows[tensor.name] = tensor.dims[0]
        return GraphFacts(*_attention(model.graph.node, rows))
    except (FileFormatError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from error


def _tensors(graph: Any, depth: int) -> Iterator[TensorProto]:
    """Every tensor of the graph and of those inside it, whose operators are checked on the way."""
    if graph.sparse_initializer:
        raise FileFormatError("holds sparse weights, which no exported decoder does")
    if depth > DEEPEST:
        raise FileFormatError(f"graphs inside graphs, more than {DEEPEST} deep")
    yield from graph.initializer
    for node in graph.node:
        if node.domain not in DOMAINS:
            raise FileFormatError(
                f"the operator {show(node.op_type)} of {show(node.domain)} is not part of ONNX Runtime"
            )
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise FileFormatError("holds sparse weights, which no exported decoder does")
            yield from (attribute.t, *attribute.tensors)
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner, depth + 1)


def _check_place(path: Path, tensor: TensorProto, sizes: dict[str, int]) -> None:
    """Whether a tensor outside the graph lies in a file beside it, from its first byte to its last.

    Args:
        path: of the graph.
        tensor: with its place.
        sizes: of files seen before, in bytes.
    """
    name, dims = tensor.name, tensor.dims[: HIGHEST_RANK + 1]
    place = {entry.key: entry.value for entry in tensor.external_data}
    texts = all(isinstance(value, str) for value in place.values())
    if len(place) < len(tensor.external_data) or not place.keys() <= KEYS or not texts or tensor.data_location != 1:
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
    if not NUMBER.fullmatch(offset) or not NUMBER.fullmatch(length):
        raise FileFormatError(f"the weights {show(name)} lie at offset {show(offset)}, length {show(length)}")
    bits = BITS.get(tensor.data_type, 0)
    needed = (math.prod(dims) * bits + 7) // 8
    sound = bits and len(dims) <= HIGHEST_RANK and min(dims, default=0) >= 0
    if not sound or ("length" in place and int(length) != needed):
        raise FileFormatError(
            f"the weights {show(name)} have {show(length)} bytes, which is not what their shape {show(dims)} needs"
        )
    if int(offset) + needed > sizes[file]:
        raise FileFormatError(
            f"the weights {show(name)} end at byte {int(offset) + needed} of {label(file)}, "
            f"which has {sizes[file]} bytes"
        )


def _attention(nodes: Any, rows: Mapping[str, int]) -> tuple[int, int | None]:
    """(layers, positions), once it is certain that each cache may be written in place.

    That is so where GroupQueryAttention alone reads a past and itself makes the present of the same layer.
    """
    makers = {name: node for node in nodes for name in node.output if name}
    readers = Counter(name for node in nodes for name in node.input)
    layers = 0
    while PRESENT.format(layers, "key") in makers:
        node = makers[PRESENT.format(layers, "key")]
        pasts, presents = ([n.format(layers, c) for c in ("key", "value")] for n in (PAST, PRESENT))
        in_place = node.op_type == "GroupQueryAttention" and node.input[3:5] == pasts and node.output[1:3] == presents
        if not in_place or any(readers[name] != 1 for name in pasts):
            raise UnsupportedError(f"{presents[0]} is not made in place by GroupQueryAttention, so nothing is rewound")
        layers += 1
    if not layers:
        raise FileFormatError(f"has no output {PRESENT.format(0, 'key')}; is it a decoder with a key/value cache?")
    tables = [name for node in nodes if node.op_type in TABLES for name in node.input[TABLES[node.op_type]]]
    return layers, min((rows[name] for name in tables if name in rows), default=None)

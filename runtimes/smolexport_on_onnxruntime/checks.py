"""Whether an ONNX folder may be opened: for this adapter and for others that run the same graphs.

All of this is checked before a library opens the folder: which graph is run, the sizes that config.json promises, where
the graph's weights are, and how it keeps its caches.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from onnx import ModelProto, TensorProto

from smolexport.errors import FileFormatError, UnsupportedError, UsageError
from smolexport.model.checkpoint import read_json
from smolexport.protobuf import read_message
from smolexport.text import label, show

# File names of schemes and of Transformers.js' dtypes, where they are not `model_` and the name.
STEMS: Mapping[str, str] = {
    **dict.fromkeys(("f32", "fp32"), "model"),
    **dict.fromkeys(("f16", "fp16"), "model_fp16"),
    **dict.fromkeys(("int4", "q4"), "model_q4"),
    **dict.fromkeys(("int8-dynamic", "q8"), "model_quantized"),
}
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
WATCHED = 0.1  # seconds
HALF_A_CORE = 0.5  # other programs may use this much and our threads still count as having cores of their own


@dataclass(frozen=True)
class CheckedGraph:
    """A graph in the file `path` with its weights beside it; config.json and the tokenizer are in `folder`.

    `context_length` in tokens, bounded also by the rotary tables.
    """

    folder: Path
    path: Path
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int


def check_folder(path: Path, graph: str | None) -> CheckedGraph:
    """Choose the graph `graph` of the folder `path` and check it; `path` may also be a graph in a folder onnx/.

    Raises:
        UsageError: a graph that the folder does not hold, or several and none is named; two graphs.
        CheckpointError: config.json is missing or damaged.
        FileFormatError: the graph is damaged, contradicts config.json, or reaches outside the folder.
        UnsupportedError: a sound graph whose caches cannot be written in place.
    """
    folder = path
    if path.is_file():
        if graph is not None:
            raise UsageError(
                f"{path}: is a graph, and the option graph names one too; give its folder, or leave it out"
            )
        if path.absolute().parent.name != "onnx":
            raise FileFormatError(f"{path}: must be in the folder onnx of an ONNX folder to be run")
        folder, graph = path.absolute().parent.parent, path.stem
    genai = _genai(folder)
    sizes = _sizes(folder, genai)
    path = _choose_graph(folder, graph, genai)
    layers, positions = read_graph(path)
    if layers != sizes["layers"]:
        raise FileFormatError(f"{path}: has {layers} layers, but config.json {sizes['layers']}")
    if positions is not None:
        sizes["context_length"] = min(sizes["context_length"], positions)
    return CheckedGraph(folder, path, **sizes)


def spins(threads: int, spinning: bool | None) -> bool:
    """Whether threads without work wait busily: `spinning`, or if just now `threads` have cores of their own.

    Busy waiting is faster on idle cores, and much slower on cores that other programs use; these are watched for a
    tenth of a second.
    """
    if threads < 2 or spinning is not None:
        return threads > 1 and bool(spinning)
    import psutil

    busy = psutil.cpu_percent(WATCHED) / 100
    return (psutil.cpu_count() or 1) * (1 - busy) > threads - HALF_A_CORE


def _sizes(folder: Path, genai: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of `CheckedGraph` by config.json; genai_config.json may bound the context, too."""
    file = folder / "config.json"
    config = read_json(file, "the folder is not an ONNX model")
    heads = _size(file, config, "num_attention_heads")
    context = _size(file, config, "max_position_embeddings")
    if genai.get("context_length") is not None:
        context = min(context, _size(folder / "genai_config.json", genai, "context_length"))
    grouped, head_dim = (config.get(key) is not None for key in ("num_key_value_heads", "head_dim"))
    return {
        "layers": _size(file, config, "num_hidden_layers"),
        "kv_heads": _size(file, config, "num_key_value_heads") if grouped else heads,
        "head_dim": _size(file, config, "head_dim") if head_dim else _size(file, config, "hidden_size") // heads,
        "vocab_size": _size(file, config, "vocab_size"),
        "context_length": context,
    }


def _choose_graph(folder: Path, name: str | None, genai: Mapping[str, Any]) -> Path:
    """The file of the graph `name`, by default the one that genai_config.json names or the only one."""
    graphs = {path.stem: path for path in sorted((folder / "onnx").glob("*.onnx")) if path.is_file()}
    if not graphs:
        raise FileFormatError(f"{folder}: has no graph onnx/*.onnx; is it an ONNX folder?")
    if name is not None:
        found = next((stem for stem in (name, STEMS.get(name), f"model_{name}") if stem in graphs), None)
        if found is None:
            raise UsageError(f"{folder}: has no graph '{name}'; it has {', '.join(graphs)}")
        return graphs[found]
    decoder = genai.get("decoder")
    named = decoder.get("filename") if isinstance(decoder, dict) else None
    if named is None:
        if len(graphs) > 1:
            raise UsageError(f"{folder}: has several graphs; choose one by the option graph: {', '.join(graphs)}")
        return next(iter(graphs.values()))
    for path in graphs.values():
        if isinstance(named, str) and PurePosixPath(named) == PurePosixPath("onnx", path.name):
            return path
    raise FileFormatError(f"{folder / 'genai_config.json'}: filename is {show(named)}, which is none of onnx/*.onnx")


def _genai(folder: Path) -> dict[str, Any]:
    """The part `model` of genai_config.json; empty without that file."""
    file = folder / "genai_config.json"
    if not file.exists():
        return {}
    model = read_json(file).get("model")
    if not isinstance(model, dict):
        raise FileFormatError(f"{file}: model is {show(model)}, not an object")
    return model


def _size(file: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FileFormatError(f"{file}: {key} is {show(value)}, not a positive integer")
    return value


def read_graph(path: Path) -> tuple[int, int | None]:
    """Check the graph in the file `path` and where its weights are.

    Returns:
        The number of attention layers, each with a cache, and of positions in the rotary tables, None without any.

    Raises:
        FileFormatError: damaged; weights outside the file's folder or beyond the end of their file; operators
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
        return _attention(model.graph.node, rows)
    except (FileFormatError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from error


def _tensors(graph: Any, depth: int) -> Iterator[TensorProto]:
    """Every tensor of the graph and of the graphs inside it; also checks their operators."""
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
    """Check that a tensor outside the graph is in a file beside it, to its last byte.

    `sizes`: of the files seen before, in bytes.
    """
    name, dims = tensor.name, tensor.dims[: HIGHEST_RANK + 1]
    place = {entry.key: entry.value for entry in tensor.external_data}
    texts = all(isinstance(value, str) for value in place.values())
    if len(place) < len(tensor.external_data) or not place.keys() <= KEYS or not texts or tensor.data_location != 1:
        raise FileFormatError(f"the weights {show(name)} are described in a way that is not understood")
    file = place.get("location", "")
    if not FILE_NAME.fullmatch(file):
        raise FileFormatError(f"the weights {show(name)} must be in a file beside the graph, not in {show(file)}")
    if file not in sizes:
        beside = path.with_name(file)
        if not beside.is_file():
            raise FileFormatError(f"the weights {show(name)} should be in {label(file)}, which is missing")
        sizes[file] = beside.stat().st_size
    offset, length = (place.get(key, "0") for key in ("offset", "length"))
    if not NUMBER.fullmatch(offset) or not NUMBER.fullmatch(length):
        raise FileFormatError(f"the weights {show(name)} have offset {show(offset)} and length {show(length)}")
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
    """(layers, positions); each cache must be one that can be written in place.

    That is so where only GroupQueryAttention reads a past and itself makes the present of the same layer.
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

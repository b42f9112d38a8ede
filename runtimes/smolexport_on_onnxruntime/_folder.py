"""Which graph of a folder is run, and what its config.json promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from smolexport.errors import FileFormatError, UsageError
from smolexport.model.checkpoint import read_json
from smolexport.text import show

# How schemes and Transformers.js' dtypes are spelled in file names, where that is not `model_` and the name.
STEMS: Mapping[str, str] = {
    **dict.fromkeys(("f32", "fp32"), "model"),
    **dict.fromkeys(("f16", "fp16"), "model_fp16"),
    **dict.fromkeys(("int4", "q4"), "model_q4"),
    **dict.fromkeys(("int8-dynamic", "q8"), "model_quantized"),
}


@dataclass(frozen=True)
class Sizes:
    """What a session needs to know of a decoder; `context_length` in tokens."""

    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int


def config_sizes(folder: Path) -> Sizes:
    """Sizes as config.json has them, the context also bounded by genai_config.json.

    Raises:
        CheckpointError: config.json is missing or damaged.
        FileFormatError: a size that is missing or no positive integer.
    """
    file = folder / "config.json"
    config = read_json(file, "the folder is not an ONNX model")
    heads = _size(file, config, "num_attention_heads")
    head_dim = config.get("head_dim")
    context = _size(file, config, "max_position_embeddings")
    genai = _genai(folder)
    if genai.get("context_length") is not None:
        context = min(context, _size(folder / "genai_config.json", genai, "context_length"))
    return Sizes(
        layers=_size(file, config, "num_hidden_layers"),
        kv_heads=_size(file, config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads,
        head_dim=_size(file, config, "hidden_size") // heads if head_dim is None else _size(file, config, "head_dim"),
        vocab_size=_size(file, config, "vocab_size"),
        context_length=context,
    )


def choose_graph(folder: Path, name: str | None) -> Path:
    """The file of the graph `name`, by default the one that genai_config.json names or the only one.

    Raises:
        UsageError: no graph of that name, or several and none is named.
        FileFormatError: there is none, or genai_config.json names something else than a graph of the folder.
    """
    graphs = {path.stem: path for path in sorted((folder / "onnx").glob("*.onnx")) if path.is_file()}
    if not graphs:
        raise FileFormatError(f"{folder}: holds no graph onnx/*.onnx; is it an ONNX folder?")
    if name is not None:
        found = next((stem for stem in (name, STEMS.get(name), f"model_{name}") if stem in graphs), None)
        if found is None:
            raise UsageError(f"{folder}: has no graph '{name}'; it has {', '.join(graphs)}")
        return graphs[found]
    decoder = _genai(folder).get("decoder")
    named = decoder.get("filename") if isinstance(decoder, dict) else None
    if named is None:
        if len(graphs) > 1:
            raise UsageError(f"{folder}: holds several graphs; choose one by the option graph: {', '.join(graphs)}")
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
        raise FileFormatError(f"{file}: model is {show(model)}, which should be an object")
    return model


def _size(file: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FileFormatError(f"{file}: {key} is {show(value)}, which should be a positive integer")
    return value

"""What an ONNX folder is, for `inspect` and `compare`: format, scheme, sizes, metadata, tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from smolexport.conversion.file_info import FileInfo, TensorRow
from smolexport.conversion.folder_files import TEMPLATES, is_companion
from smolexport.errors import CheckpointError, FileFormatError
from smolexport.model.checkpoint import read_json
from smolexport_to_onnx.reading import (
    GENAI,
    SCHEME_KEY,
    Model,
    graph_paths,
    metadata_of,
    primary_graph,
    read_graph,
    read_model,
)
from smolexport_to_onnx.schemes import SCHEMES, STEMS

NAME_KEY, POSITIONS_KEY = "smolexport.name", "smolexport.max_positions"
OURS = frozenset({"config.json", "README.md", GENAI})
MADE = frozenset(name for stem in STEMS.values() for name in (f"onnx/{stem}.onnx", f"onnx/{stem}.onnx_data"))


def recognises(path: Path) -> bool:
    """Whether `path` is a folder with a graph in it, or the graph itself.

    A folder with safetensors is a checkpoint: many have an ONNX file beside them that somebody else made.
    """
    try:
        if path.is_file():
            return path.suffix == ".onnx"
        return path.is_dir() and bool(graph_paths(path)) and next(path.glob("*.safetensors"), None) is None
    except OSError:
        return False


def replaceable(path: Path) -> bool:
    """Whether `path` is a folder that smolexport made, every graph of it, and that holds nothing else.

    A file with a name that no export writes, a link or a folder of another name makes it somebody's own.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            return False
        for entry in path.rglob("*"):
            name = entry.relative_to(path).as_posix()
            if entry.is_symlink() or not (entry.is_file() or (entry.is_dir() and name in ("onnx", TEMPLATES))):
                return False
            if entry.is_file() and name not in OURS | MADE and not is_companion(name):
                return False
        graphs = graph_paths(path)
        return bool(graphs) and all(SCHEME_KEY in metadata_of(read_graph(graph)) for graph in graphs)
    except (OSError, FileFormatError):
        return False


def describe(path: Path) -> FileInfo:
    """Read the graph that `path` is run by, of any architecture; no tensor data.

    Raises:
        FileFormatError: damaged, or no ONNX folder.
    """
    model = read_model(primary_graph(path))
    folder = _folder(path)
    config = _config(folder)
    rows = (
        *(TensorRow(name, s.shape, s.form.name, s.nbytes, s.parts[0].offset) for name, s in model.stored.items()),
        *(TensorRow(a.name, a.shape, a.dtype.lower(), a.nbytes, a.offset) for a in model.others),
    )
    nbytes, count = sum(r.nbytes for r in rows), sum(prod(r.shape) for r in rows)
    return FileInfo(
        path=path,
        format="onnx",
        architecture=str(config.get("model_type", "?")),
        name=model.metadata.get(NAME_KEY, folder.resolve().name),
        scheme=_scheme(path, model),
        bytes=sum(file.stat().st_size for file in _files(path, model)),
        weights=count,
        bits_per_weight=8 * nbytes / count if count else 0.0,
        metadata={**model.metadata, **{f"config.{key}": value for key, value in config.items()}},
        tensors=rows,
    )


def _folder(path: Path) -> Path:
    """The folder of a graph: the one with config.json."""
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == "onnx" else path.parent


def _files(path: Path, model: Model) -> set[Path]:
    """Those of the folder `path`; of a graph, itself and what holds its weights: anything may lie beside it."""
    if path.is_dir():
        return {file for file in path.rglob("*") if file.is_file()}
    return {path, *(array.path for array in model.arrays.values())}


def _config(folder: Path) -> Mapping[str, Any]:
    if not (folder / "config.json").is_file():
        return {}
    try:
        return read_json(folder / "config.json")
    except CheckpointError as error:
        raise FileFormatError(str(error)) from error


def _scheme(path: Path, model: Model) -> str:
    """The scheme on record, with those of the graphs beside it; of a stranger's graph, the format of most weights."""
    own = model.metadata.get(SCHEME_KEY)
    if own in SCHEMES:
        beside = [] if path.is_file() else [graph for graph in graph_paths(path) if graph != model.path]
        others = (metadata_of(read_graph(graph)).get(SCHEME_KEY) for graph in beside)
        return "+".join(name for name in (own, *others) if name and name in SCHEMES)
    sizes: Counter[str] = Counter()
    for stored in model.stored.values():
        sizes[stored.form.name] += prod(stored.shape)
    return sizes.most_common(1)[0][0] if sizes else "?"

"""Whether a folder is fit to be opened: for this adapter and for those of other players of the same graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smolexport.errors import FileFormatError, UsageError
from smolexport_on_onnxruntime._folder import Sizes, choose_graph, config_sizes
from smolexport_on_onnxruntime._graph import read_graph


@dataclass(frozen=True)
class CheckedGraph:
    """A graph in the file `path` whose weights lie beside it, config.json and the tokenizer in `folder`.

    `context_length` in tokens, the rotary tables' too.
    """

    folder: Path
    path: Path
    sizes: Sizes
    context_length: int


def check_folder(path: Path, graph: str | None) -> CheckedGraph:
    """Choose the graph `graph` of the folder `path` and read what may be read of it before a library opens it.

    Where `path` is a graph itself, in the folder onnx of such a folder, it is the one.

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
            raise FileFormatError(f"{path}: should lie in the folder onnx of an ONNX folder, to be run")
        folder, graph = path.absolute().parent.parent, path.stem
    sizes = config_sizes(folder)
    path = choose_graph(folder, graph)
    facts = read_graph(path)
    if facts.layers != sizes.layers:
        raise FileFormatError(f"{path}: has {facts.layers} layers, but config.json {sizes.layers}")
    reach = sizes.context_length if facts.positions is None else min(sizes.context_length, facts.positions)
    return CheckedGraph(folder, path, sizes, reach)

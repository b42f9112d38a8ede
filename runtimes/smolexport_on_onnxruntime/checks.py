"""Whether a folder is fit to be opened: for this adapter and for those of other players of the same graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smolexport.errors import FileFormatError
from smolexport_on_onnxruntime._folder import Sizes, choose_graph, config_sizes
from smolexport_on_onnxruntime._graph import read_graph

__all__ = ["CheckedGraph", "check_folder"]


@dataclass(frozen=True)
class CheckedGraph:
    """A graph in the file `path` whose weights lie beside it; `context_length` in tokens, the rotary tables' too."""

    path: Path
    sizes: Sizes
    context_length: int


def check_folder(folder: Path, graph: str | None) -> CheckedGraph:
    """Choose the graph `graph` of `folder` and read what may be read of it before a library opens it.

    Raises:
        UsageError: a graph that the folder does not hold, or several and none is named.
        CheckpointError: config.json is missing or damaged.
        FileFormatError: the graph is damaged, contradicts config.json, or reaches outside the folder.
        UnsupportedError: a sound graph whose caches cannot be written in place.
    """
    sizes = config_sizes(folder)
    path = choose_graph(folder, graph)
    facts = read_graph(path)
    if facts.layers != sizes.layers:
        raise FileFormatError(f"{path}: has {facts.layers} layers, but config.json {sizes.layers}")
    reach = sizes.context_length if facts.positions is None else min(sizes.context_length, facts.positions)
    return CheckedGraph(path, sizes, reach)

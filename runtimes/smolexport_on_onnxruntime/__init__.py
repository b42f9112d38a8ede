"""ONNX folders run by plain ONNX Runtime on the CPU, with key/value caches that are written in place.

No library of custom operators is ever loaded, and nothing outside the folder is read.

What the session sets, and why, by `tests/benchmarks/onnx_decode.py`:

* Threads without work spin on an idle machine, and sleep where other programs need the cores: on two idle cores
  spinning made decoding 1.5 times as fast, on two shared ones it cost up to half of the speed.
* Prompts run in blocks of 128, the fastest size for attention, and only the last token's logits are computed unless all
  are requested.
* All else is ONNX Runtime's default.  Graph optimizations, memory planning and the arena made no difference beyond
  noise; weights are prepacked, without which 4 bits decode at 2 tokens/s instead of 130 (135M, one thread).
"""

from __future__ import annotations

from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from smolexport.errors import importing

if TYPE_CHECKING:
    from smolexport_on_onnxruntime._session import OnnxSession

NAME = "onnxruntime"
READS = "onnx"
REQUIRES = ("onnxruntime",)
INSTALL_HINT = "pip install onnxruntime"
importing_libraries = partial(importing, "the runtime onnxruntime", REQUIRES, INSTALL_HINT)


def version() -> str:
    """Version of ONNX Runtime, e.g. `onnxruntime 1.31.1`; raises MissingDependencyError."""
    with importing_libraries():
        return f"{NAME} {metadata.version(NAME)}"


def open(  # noqa: A001
    path: Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    graph: str | None = None,
    spinning: bool | None = None,
) -> OnnxSession:
    """Load one graph of the ONNX folder `path`, or the graph `path` in its folder onnx.

    Args:
        path: folder with config.json, the graphs in onnx/ and, unless there is one graph only, genai_config.json.
        threads: that compute; None: one per physical core.
        context: most tokens held, for which memory is allocated at once; None: the model's own, at most 4096.
        graph: file name without its ending, e.g. `model_q4`, or a scheme, e.g. `int4`; None: the one that
            genai_config.json names.
        spinning: whether threads without work spin; None: if no other program uses their cores.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        UsageError: an option out of range, or a graph that the folder does not have.
        CheckpointError: config.json is missing or damaged.
        FileFormatError: the graph is damaged, contradicts config.json, or reaches outside the folder.
        UnsupportedError: a sound graph whose caches cannot be written in place, so that nothing could be rewound.
    """
    with importing_libraries():
        from smolexport_on_onnxruntime._session import OnnxSession
    return OnnxSession(Path(path), threads, context, graph, spinning)

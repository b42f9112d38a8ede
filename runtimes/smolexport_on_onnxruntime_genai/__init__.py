"""ONNX folders run by ONNX Runtime GenAI's generator on the CPU, beside the adapter over plain ONNX Runtime.

It runs what `smolexport_on_onnxruntime` runs, which is faster and the default; this one shows that a folder computes
the same in the other library that it is made for.

Before the library opens a folder its graph is checked as the plain adapter does, and genai_config.json may only contain
what the converter writes: the library would follow it to other files, providers and models.
"""

from __future__ import annotations

from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from smolexport.errors import importing

if TYPE_CHECKING:
    from smolexport_on_onnxruntime_genai._chat import GenaiChat
    from smolexport_on_onnxruntime_genai._session import GenaiSession

NAME = "onnxruntime-genai"
READS = "onnx"
REQUIRES = ("onnxruntime_genai", "onnxruntime")
INSTALL_HINT = "pip install onnxruntime-genai"
importing_libraries = partial(importing, "the runtime onnxruntime-genai", REQUIRES, INSTALL_HINT)


def version() -> str:
    """Versions of the library and of the ONNX Runtime below it; raises MissingDependencyError."""
    with importing_libraries():
        return ", ".join(f"{name} {metadata.version(name)}" for name in (NAME, "onnxruntime"))


def open(  # noqa: A001
    path: Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    graph: str | None = None,
    spinning: bool | None = None,
) -> GenaiSession:
    """Load one graph of the ONNX folder `path`, which must have a genai_config.json.

    Arguments and errors as for `smolexport_on_onnxruntime.open`; also raises UnsupportedError for keys of
    genai_config.json that no exported decoder needs, FileFormatError for what the library cannot load.
    """
    with importing_libraries():
        from smolexport_on_onnxruntime_genai._session import GenaiSession
    return GenaiSession(Path(path), threads, context, graph, spinning)


def open_chat(path: Path) -> GenaiChat:
    """The library's own tokenizer and chat template of the folder `path`, which `open` should have accepted before.

    Raises:
        MissingDependencyError: onnxruntime-genai is not installed.
        TokenizerError: the library cannot read the tokenizer.
    """
    with importing_libraries():
        from smolexport_on_onnxruntime_genai._chat import GenaiChat
    return GenaiChat(Path(path))

"""GGUF files run by llama.cpp, through the low-level functions of llama-cpp-python."""

from __future__ import annotations

from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from smolexport.errors import importing

if TYPE_CHECKING:
    from smolexport_on_llamacpp._chat import LlamaChat
    from smolexport_on_llamacpp._session import LlamaSession

NAME = "llama.cpp"
READS = "gguf"
REQUIRES = ("llama_cpp",)
INSTALL_HINT = "pip install llama-cpp-python"
importing_libraries = partial(importing, "the runtime llama.cpp", REQUIRES, INSTALL_HINT)


def version() -> str:
    """Version of the bindings, each of which pins one of llama.cpp; raises MissingDependencyError."""
    with importing_libraries():
        return f"llama-cpp-python {metadata.version('llama-cpp-python')}"


def open(  # noqa: A001
    path: Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    kv_type: str = "f16",
    flash_attention: bool | None = None,
    batch: int = 512,
    gpu_layers: int = 0,
) -> LlamaSession:
    """Load the GGUF file `path`.

    For a strict comparison of structure use `kv_type="f32"`, `flash_attention=False`, `threads=1` and a file in F32:
    with F16 and BF16 files llama.cpp rounds the activations too.

    Args:
        path: the file.
        threads: None: one per physical core.
        context: most tokens held; None: the model's own, at most 4096.
        kv_type: type of the key/value cache, `f16` (llama.cpp's default) or `f32`.
        flash_attention: None leaves the choice to llama.cpp.  It computes with keys and values in f16 whatever
            `kv_type` is.
        batch: most tokens computed at once; longer appends are split.
        gpu_layers: layers to run on a GPU; 0 keeps everything on the CPU, -1 moves all.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        UsageError: an option out of range.
        FileFormatError: llama.cpp cannot load the file; carries its reason.
    """
    from smolexport_on_llamacpp._session import LlamaSession

    return LlamaSession(Path(path), threads, context, kv_type, flash_attention, batch, gpu_layers)


def open_chat(path: Path) -> LlamaChat:
    """llama.cpp's tokenizer of the GGUF file `path`, and its chat template in the bindings' Jinja.

    The C library has no Jinja: its own function recognises some known templates, and renders no others.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        FileFormatError: llama.cpp cannot load the file; carries its reason.
    """
    from smolexport_on_llamacpp._chat import LlamaChat

    return LlamaChat(Path(path))

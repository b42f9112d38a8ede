"""MLX folders run by mlx-lm: on a Mac's GPU, and for checking on any Linux CPU.

Only config.json and safetensors are read, and no code from the folder is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from smolexport.errors import importing
from smolexport.run.chat import TokenizerChat, reading_tokenizer

if TYPE_CHECKING:
    from smolexport_on_mlx._session import MlxSession

NAME = "mlx"
READS = "mlx"
REQUIRES = ("mlx", "mlx_lm")
INSTALL_HINT = "pip install 'mlx[cpu]' mlx-lm"  # the extra adds the CPU library on Linux and nothing on a Mac


@contextmanager
def importing_libraries() -> Iterator[None]:
    """Import mlx-lm within: it sets the process's limits of open files to 2048 and 4096, for good.

    That would affect the rest of the program, and fails where less than 4096 is allowed.
    """
    with importing("the runtime mlx", REQUIRES, INSTALL_HINT):
        import resource  # absent on Windows, where mlx-lm cannot be imported either

        original = resource.setrlimit

        def all_but_files(kind: int, limits: tuple[int, int]) -> None:
            if kind != resource.RLIMIT_NOFILE:
                original(kind, limits)

        resource.setrlimit = all_but_files
        try:
            yield
        finally:
            resource.setrlimit = original


def version() -> str:
    """Versions of both libraries, e.g. `mlx 0.32.4, mlx-lm 0.32.2`; raises MissingDependencyError."""
    with importing_libraries():
        return ", ".join(f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm"))


def open(  # noqa: A001
    path: Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    dtype: str | None = None,
) -> MlxSession:
    """Load the MLX folder `path`.

    Args:
        path: folder with config.json and model*.safetensors, quantized or not.
        threads: accepted and checked as for every runtime, without effect: MLX computes on one CPU thread, or on
            the GPU, and offers no setting.
        context: most tokens held; None: the model's own, at most 4096.
        dtype: `f32`, `f16` or `bf16`, of the arithmetic and of the key/value cache.  None: f32 on a CPU, where
            MLX accumulates in the activations' dtype and bf16 costs several percent per matrix; on a GPU the folder's
            own.  Scales and biases of quantized weights are cast too, which to f32 is exact.

    Raises:
        MissingDependencyError: mlx or mlx-lm is not installed, or cannot run here.
        UsageError: an option out of range.
        CheckpointError: config.json is missing or damaged.
        FileFormatError: the folder asks for code, or mlx-lm cannot load exactly its weights.
        UnsupportedError: a model whose cache cannot be rewound.
    """
    with importing_libraries():
        from smolexport_on_mlx._session import MlxSession
    return MlxSession(Path(path), threads, context, dtype)


def open_chat(path: Path) -> TokenizerChat:
    """mlx-lm's tokenizer and chat template of the folder `path`: transformers' in a wrapper with its own defaults.

    Raises:
        MissingDependencyError: mlx or mlx-lm is not installed, or cannot run here.
        TokenizerError: mlx-lm cannot read the tokenizer.
    """
    with importing_libraries():
        from mlx_lm import tokenizer_utils
    with reading_tokenizer(path, "mlx-lm"):
        return TokenizerChat(tokenizer_utils.load(path, {"trust_remote_code": False, "local_files_only": True}))

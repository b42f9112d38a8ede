"""MLX folders run by mlx-lm: on a Mac's GPU, and for checking on any Linux CPU.

Only config.json and safetensors are read, and no code from the folder is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from smolexport.errors import MissingDependencyError

if TYPE_CHECKING:
    from smolexport_on_mlx._chat import MlxChat
    from smolexport_on_mlx._session import MlxSession

NAME = "mlx"
READS = "mlx"
REQUIRES = ("mlx", "mlx_lm")
INSTALL_HINT = "pip install 'mlx[cpu]' mlx-lm"  # the extra adds the CPU library on Linux and nothing on a Mac


def version() -> str:
    """Versions of both libraries, e.g. `mlx 0.32.4, mlx-lm 0.32.2`.

    Raises:
        MissingDependencyError: one of them is not installed.
    """
    try:
        return ", ".join(f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm"))
    except metadata.PackageNotFoundError as error:
        raise _missing(error) from error


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
            MLX adds up in the activations' dtype and bf16 costs several percent per matrix; on a GPU the folder's
            own.  Scales and biases of quantized weights are cast too, which towards f32 is exact.

    Raises:
        MissingDependencyError: mlx or mlx-lm is not installed, or cannot run here.
        UsageError: an option out of range.
        CheckpointError: config.json is missing or damaged.
        FileFormatError: the folder asks for code, or mlx-lm cannot load exactly its weights.
        UnsupportedError: a model whose memory cannot be rewound.
    """
    try:
        with _file_limits_kept():
            from smolexport_on_mlx._session import MlxSession
    except ImportError as error:
        raise _missing(error) from error
    return MlxSession(Path(path), threads=threads, context=context, dtype=dtype)


def open_chat(path: Path) -> MlxChat:
    """mlx-lm's tokenizer and chat template of the folder `path`.

    Raises:
        MissingDependencyError: mlx or mlx-lm is not installed, or cannot run here.
        TokenizerError: mlx-lm cannot read the tokenizer.
    """
    try:
        with _file_limits_kept():
            from smolexport_on_mlx._chat import MlxChat
    except ImportError as error:
        raise _missing(error) from error
    return MlxChat(Path(path))


@contextmanager
def _file_limits_kept() -> Iterator[None]:
    """Import mlx-lm in here: it sets the process's limits of open files to 2048 and 4096, for good.

    That would take files from the rest of the program, and fails where less than 4096 is allowed.
    """
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


def _missing(error: Exception) -> MissingDependencyError:
    reason = " ".join(str(error).split())
    return MissingDependencyError(f"the MLX runtime needs mlx and mlx-lm ({reason}): {INSTALL_HINT}")

"""The reference: a checkpoint played by transformers, in bf16 unless asked otherwise; and the training of scales.

Only safetensors are read and no code from the checkpoint is ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smolexport.calibration.distillation import (
    AffineBlocks,
    Distilled,
    Rounding,
    Settings,
    Step,
    Teacher,
    to_half,
)
from smolexport.errors import MissingDependencyError

if TYPE_CHECKING:
    from smolexport.model.checkpoint import Checkpoint
    from smolexport_on_torch._chat import TransformersChat
    from smolexport_on_torch._collect import TorchEngine
    from smolexport_on_torch._session import TorchSession

__all__ = [
    "INSTALL",
    "NAME",
    "NEEDS",
    "READS",
    "distil",
    "divergence",
    "engine",
    "open",
    "open_chat",
    "sensitivity",
    "version",
]

NAME = "torch"
READS = "checkpoint"
NEEDS = ("torch", "transformers")
INSTALL = "pip install torch transformers"


def version() -> str:
    """Versions of torch and transformers, e.g. `torch 2.13.0, transformers 5.23.0`.

    Raises:
        MissingDependencyError: one of them is not installed.
    """
    try:
        return ", ".join(f"{name} {metadata.version(name)}" for name in NEEDS)
    except metadata.PackageNotFoundError as error:
        raise _missing(error) from error


def distil(
    folder: Path,
    frozen: Iterable[tuple[str, NDArray[np.float32]]],
    trained: Mapping[str, AffineBlocks],
    windows: NDArray[np.int32],
    teacher: Teacher,
    *,
    settings: Settings | None = None,
    rounded: Rounding = to_half,
    progress: Callable[[Step], None] | None = None,
) -> Distilled:
    """Train the factors of quantized matrices until the model predicts what the original predicted.

    The last sixteenth of the windows, at least two, is not trained on: it decides which step's factors are kept.

    Args:
        folder: the checkpoint; only its config.json is read.
        frozen: (source name, values) of every other tensor, as the file will hold them; taken one at a time.
        trained: the matrices by source name; of a tied model the embedding also serves as the head.
        windows: [n, w] token ids, three windows at least.
        teacher: the original's predictions on them; indexed by window, so it may lie on disk.
        settings: how to train; None: the defaults.
        rounded: makes the factors that a file can hold; the validation sees only these.
        progress: called after every step.

    Returns:
        Rounded factors, and whether they are better than those given, which come back if nothing was.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        UsageError: too few windows, shapes that do not match, a tensor given twice, no such device.
        CheckpointError: a tensor is missing, unknown, of another shape, or not the weight of a matrix.
    """
    try:
        from smolexport_on_torch import _distil
    except ImportError as error:
        raise _missing(error) from error
    return _distil.distil(
        Path(folder), frozen, trained, windows, teacher,
        settings=settings or Settings(), rounded=rounded, progress=progress,
    )  # fmt: skip


def sensitivity(
    folder: Path, windows: NDArray[np.int32], seed: int = 0, threads: int | None = None
) -> dict[str, NDArray[np.float64]]:
    """How much the predictions feel an error in what each matrix puts out.

    Args:
        folder: the checkpoint; all of it is in memory, in float32.
        windows: [n, w] token ids; a dozen windows suffice.
        seed: of the tokens that are drawn.
        threads: torch's; None: one per physical core.

    Returns:
        By source name the mean over tokens of the squared gradient of log p(y | context), y drawn from the model, by
        each output of the matrix; for `lm_head.weight` of p (1 - p), whether or not the head is tied; for the embedding
        by each column of what is looked up.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    try:
        from smolexport_on_torch import _sensitivity
    except ImportError as error:
        raise _missing(error) from error
    return _sensitivity.sensitivity(Path(folder), windows, seed, threads)


def divergence(
    folder: Path,
    weights: Iterable[tuple[str, NDArray[np.float32]]],
    windows: NDArray[np.int32],
    teacher: Teacher,
    threads: int | None = None,
) -> float:
    """Mean divergence of a model with other weights from what the original predicted, nats per token.

    Args:
        folder: the checkpoint; only its config.json is read.
        weights: (source name, values) of every tensor; taken one at a time.
        windows: [n, w] token ids.
        teacher: the original's predictions on them.
        threads: torch's; None: one per physical core.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    try:
        from smolexport_on_torch import _sensitivity
    except ImportError as error:
        raise _missing(error) from error
    return _sensitivity.divergence(Path(folder), weights, windows, teacher, threads)


def open(  # noqa: A001
    path: Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    dtype: str = "bf16",
    weights: Iterable[tuple[str, NDArray[Any]]] | None = None,
) -> TorchSession:
    """Load the checkpoint in the folder `path`.

    Args:
        path: folder with config.json and safetensors.
        threads: torch's intra-op threads while this session computes; None: one per physical core.
        context: most tokens held; None: the model's own, at most 4096.
        dtype: `bf16` or `f32`, of the weights and of the arithmetic.
        weights: (source name, array) pairs that take the place of the folder's safetensors, e.g. the decoded
            weights of an exported file; taken one at a time, float32, float16 or bfloat16.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        UsageError: an option out of range.
        CheckpointError: the folder or a tensor is missing, damaged or contradictory.
    """
    try:
        from smolexport_on_torch._session import TorchSession
    except ImportError as error:
        raise _missing(error) from error
    return TorchSession(Path(path), threads=threads, context=context, dtype=dtype, weights=weights)


def open_chat(path: Path) -> TransformersChat:
    """transformers' tokenizer and chat template of the folder `path`: of a checkpoint, or of any with such files.

    Raises:
        MissingDependencyError: transformers is not installed.
        TokenizerError: transformers cannot read the tokenizer.
    """
    try:
        from smolexport_on_torch._chat import TransformersChat
    except ImportError as error:
        raise _missing(error) from error
    return TransformersChat(Path(path))


def engine(checkpoint: Checkpoint, *, threads: int | None = None) -> TorchEngine:
    """What runs the layers of `checkpoint` one by one, for `smolexport.calibration`.

    Args:
        checkpoint: an opened one.
        threads: torch's intra-op threads; None: one per physical core.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    try:
        from smolexport_on_torch._collect import TorchEngine
    except ImportError as error:
        raise _missing(error) from error
    return TorchEngine(checkpoint, threads=threads)


def _missing(error: Exception) -> MissingDependencyError:
    return MissingDependencyError(f"the torch runtime needs torch and transformers ({error}): {INSTALL}")

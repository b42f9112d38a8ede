"""The trainer: runs a checkpoint layer by layer or with gradients; see `smolexport.calibration.trainer.Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from smolexport.calibration.trainer import AffineBlocks, Distilled, Rounding, Settings, Step, Teacher, to_half
from smolexport.checkpoint import Checkpoint
from smolexport_on_torch import NAME, missing, version

if TYPE_CHECKING:
    from smolexport_on_torch._collect import TorchEngine

__all__ = ["NAME", "distil", "divergence", "engine", "sensitivity", "version"]


def engine(checkpoint: Checkpoint, *, threads: int | None = None) -> TorchEngine:
    """Runs the layers of `checkpoint` one by one; `threads` are torch's intra-op threads."""
    try:
        from smolexport_on_torch._collect import TorchEngine
    except ImportError as error:
        raise missing(error) from error
    return TorchEngine(checkpoint, threads=threads)


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
    """Train the factors of quantized matrices until the model predicts what the original predicted."""
    try:
        from smolexport_on_torch import _distil
    except ImportError as error:
        raise missing(error) from error
    return _distil.distil(
        Path(folder), frozen, trained, windows, teacher,
        settings=settings or Settings(), rounded=rounded, progress=progress,
    )  # fmt: skip


def sensitivity(
    folder: Path, windows: NDArray[np.int32], seed: int = 0, threads: int | None = None
) -> dict[str, NDArray[np.float64]]:
    """How much the predictions feel an error in what each matrix puts out."""
    try:
        from smolexport_on_torch import _sensitivity
    except ImportError as error:
        raise missing(error) from error
    return _sensitivity.sensitivity(Path(folder), windows, seed, threads)


def divergence(
    folder: Path,
    weights: Iterable[tuple[str, NDArray[np.float32]]],
    windows: NDArray[np.int32],
    teacher: Teacher,
    threads: int | None = None,
) -> float:
    """Mean divergence of a model with other weights from what the original predicted, nats per token."""
    try:
        from smolexport_on_torch import _sensitivity
    except ImportError as error:
        raise missing(error) from error
    return _sensitivity.divergence(Path(folder), weights, windows, teacher, threads)

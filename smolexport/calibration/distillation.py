"""Scale distillation as its callers see it: what it takes and what it gives.  The training itself needs torch.

Every trained matrix is an affine block format with its codes frozen, `value = d * a - m * b` per block.  The factors d,
and m where the format has a free minimum, are trained until the quantized model predicts what the original does on the
calibration windows; nothing else changes, so a file holds the result like any other.

Notation: n = rows, c = columns, w = tokens of a window, k = tokens of the original's prediction that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError

__all__ = ["AffineBlocks", "Distilled", "Rounding", "Settings", "Step", "Teacher", "Trained", "held_out", "to_half"]

HELD_OUT = 16  # one window of so many is for validation
LEAST_HELD_OUT = 2


class AffineBlocks(Protocol):
    """A matrix [n, c] as `d[:, j // block] * a[:, j] - m[:, j // block] * b[:, j]`; a row's last block may be short."""

    @property
    def a(self) -> NDArray[np.float32]:
        """[n, c], frozen: codes, times sub-block scales where there are such."""
        ...

    @property
    def d(self) -> NDArray[np.float32]:
        """[n, blocks], trained."""
        ...

    @property
    def b(self) -> NDArray[np.float32] | None:
        """[n, c], frozen; None where the format has no free minimum."""
        ...

    @property
    def m(self) -> NDArray[np.float32] | None:
        """[n, blocks], trained; None with `b`."""
        ...

    @property
    def block(self) -> int:
        """Columns that share one d and one m."""
        ...


class Teacher(Protocol):
    """What the original model predicts after each token of each window, at temperature 1."""

    @property
    def ids(self) -> NDArray[Any]:
        """[windows, w, k] distinct token ids, the likeliest k."""
        ...

    @property
    def log_probs(self) -> NDArray[Any]:
        """[windows, w, k] their natural log-probabilities; what is left to 1 is the tail."""
        ...


@dataclass(frozen=True)
class Trained:
    """Factors of one matrix: d, and m where the format has one, both [n, blocks].  Either may be of any sign."""

    d: NDArray[np.float32]
    m: NDArray[np.float32] | None


Rounding = Callable[[str, Trained], Trained]
"""(source name, factors) -> the factors that a file can hold."""


def to_half(name: str, factors: Trained) -> Trained:  # noqa: ARG001
    """Rounds to float16, the type of the scales of most formats."""
    return Trained(_half(factors.d), None if factors.m is None else _half(factors.m))


def _half(values: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what training blew up is inf, and will be judged so
        return values.astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: updates of the factors.
        batch: windows per update.
        rate: largest learning rate, relative to the weights: 0.003 moves them by about 0.3 % a step.
        warm_up: share of the steps over which the rate rises from 0; from then on it falls linearly to 0.
        validate_every: steps between two looks at the held-out windows.
        patience: looks without a new best after which training ends.
        seed: of the order of the windows.
        device: `cpu`, `cuda`, or `auto`: cuda where there is one.
        threads: torch's threads; None: one per physical core.
        memory: bytes of activations to stay below: a batch is taken in parts, layers are computed twice.
    """

    steps: int = 80
    batch: int = 8
    rate: float = 3e-3
    warm_up: float = 0.05
    validate_every: int = 20
    patience: int = 4
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    memory: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "validate_every", "patience", "memory"):
            if getattr(self, name) < 1:
                raise UsageError(f"distillation: {name} = {getattr(self, name)} should be at least 1")
        if not self.rate > 0:
            raise UsageError(f"distillation: rate = {self.rate} should be above 0")
        if not 0 <= self.warm_up < 1:
            raise UsageError(f"distillation: warm_up = {self.warm_up} should lie in [0, 1)")
        if self.device not in {"auto", "cpu", "cuda"}:
            raise UsageError(f"distillation: device = {self.device!r} should be auto, cpu or cuda")

    def rate_at(self, step: int) -> float:
        """Learning rate of update number `step`, from 0."""
        warm = max(1, round(self.warm_up * self.steps))
        return self.rate * min(1.0, (step + 1) / warm) * (1 - step / self.steps)


@dataclass(frozen=True)
class Step:
    """One update of the factors.

    Attributes:
        number: from 1.
        loss: divergence from the original on the batch before the update, nats per token.
        validation: divergence on the held-out windows after it, with rounded factors; None where not looked at.
    """

    number: int
    loss: float
    validation: float | None = None


@dataclass(frozen=True)
class Distilled:
    """The outcome.

    Attributes:
        factors: by source name, rounded; those given where training did not help.
        before: divergence from the original on the held-out windows, nats per token, with the factors given.
        after: with `factors`; equal to `before` unless `improved`.
        best: number of the step that `factors` are from; 0: the start.
        history: every step taken.
        ended: `steps` (all taken), `patience` (no new best for long) or `diverged` (a loss that is not finite).
        tokens: of text trained on, windows taken twice counted twice.
        device: where it ran.
    """

    factors: Mapping[str, Trained]
    before: float
    after: float
    best: int
    history: tuple[Step, ...]
    ended: str
    tokens: int
    device: str

    @property
    def improved(self) -> bool:
        """Whether some step was better than the start; otherwise everything was rolled back."""
        return self.best > 0

    def __str__(self) -> str:
        taken = f"{len(self.history)} steps ({self.tokens:,} tokens, ended by {self.ended})"
        if not self.improved:
            return f"rolled back to the start: {taken} did not lower the KLD on held-out windows, {self.before:.5f}"
        return f"KLD on held-out windows {self.before:.5f} -> {self.after:.5f} at step {self.best} of {taken}"


def held_out(windows: int) -> int:
    """How many windows, the last ones, are kept for validation.

    Raises:
        UsageError: none would be left to train on.
    """
    least = LEAST_HELD_OUT + 1
    if windows < least:
        raise UsageError(f"distillation: {windows} calibration windows; {least} are the least, more text is needed")
    return max(LEAST_HELD_OUT, windows // HELD_OUT)

"""The interface of a trainer: the plug-in that runs a model with gradients or layer by layer.

A runtime that trains names a module as its `TRAINER`; `plugins.trainer` finds it.

Scale distillation: every trained matrix is an affine block format with frozen codes, `value = d * a - m * b` per block.
The factors d, and m where the format has a free minimum, are trained until the quantized model predicts what the
original does on the calibration windows; nothing else changes, so a file holds the result like any other.

Notation: n = rows or windows, c = columns, w = tokens of a window, k = tokens kept of the original's predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.spec import Layer, ModelSpec
from smolexport.quant.affine_view import Factors

KINDS = ("attn", "o", "mlp", "down")  # the inputs of a layer, in the order of the forward pass
HELD_OUT = 16  # one window in so many is for validation
LEAST_HELD_OUT = 2

AffineBlocks: TypeAlias = Factors
"""A matrix [n, c] as `d[:, j // block] * a[:, j] - m[:, j // block] * b[:, j]`: a and b are frozen, d and m trained."""


def input_columns(spec: ModelSpec, layer: Layer) -> dict[str, int]:
    """Columns of each of `KINDS` in `layer`."""
    heads = layer.mixer.num_attention_heads * layer.mixer.head_dim
    columns = (spec.hidden_size, heads, spec.hidden_size, layer.mlp.intermediate_size)
    return dict(zip(KINDS, columns, strict=True))


@dataclass(frozen=True)
class ActivationStats:
    """Second moments of one input of c columns.

    Attributes:
        hessian: [c, c] float32, X^T X / T over all positions but the first of each window; only the upper triangle is
            defined.
        mean_squares: [c] float32, over all positions.
        largest_share: share of the Hessian's trace that comes from the largest single token.
    """

    hessian: NDArray[np.float32] = field(repr=False)
    mean_squares: NDArray[np.float32] = field(repr=False)
    largest_share: float


class Engine(Protocol):
    """Runs the layers of one checkpoint over all windows; hidden states are files [n, w, hidden_size] float32."""

    def embed(self, windows: NDArray[np.int32], target: Path) -> None:
        """Write the hidden states before the first layer to `target`; raises OSError."""
        ...

    def layer(self, index: int, shape: tuple[int, int], source: Path, target: Path) -> Mapping[str, ActivationStats]:
        """Run layer `index` over all windows, `shape` [n, w], from `source` to `target`; its statistics by kind."""
        ...

    def finish(
        self,
        shape: tuple[int, int],
        source: Path,
        k: int,
        write: Callable[[NDArray[np.int32], NDArray[np.float32]], None],
    ) -> ActivationStats:
        """Run the head over all windows, `shape` [n, w]; statistics of its input.

        `write` is called for each window in order, with ids and log-probabilities [w, k] of the k likeliest tokens.
        """
        ...

    def sample(
        self,
        count: int,
        window: int,
        first: NDArray[np.int32],
        bos: int | None,
        seed: int,
        progress: Callable[[int], None],
    ) -> NDArray[np.int32]:
        """[count, window] tokens that the model writes itself, at temperature 1, after `bos` and one of `first`.

        `progress` is called with numbers of tokens written.
        """
        ...


@dataclass(frozen=True)
class Teacher:
    """The original model's predictions at temperature 1, the likeliest first.

    Attributes:
        ids: [n, w, k] int32, distinct.
        log_probs: [n, w, k] float32, natural logarithms; what is missing to 1 is the tail.
    """

    ids: NDArray[np.int32] = field(repr=False)
    log_probs: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True)
class Trained:
    """Factors of one matrix: d, and m where the format has one, both [n, blocks].  Either may be of any sign."""

    d: NDArray[np.float32]
    m: NDArray[np.float32] | None


Rounding = Callable[[str, Trained], Trained]
"""(source name, factors) -> the factors that a file can hold."""


@dataclass(frozen=True)
class DistilSettings:
    """How to train.

    Attributes:
        steps: updates of the factors.
        batch: windows per update.
        rate: largest learning rate, relative to the weights: 0.003 moves them by about 0.3 % a step.
        warm_up: share of the steps over which the rate rises from 0; from then on it falls linearly to 0.
        validate_every: steps between two validations on the held-out windows.
        patience: validations without a new best after which training ends.
        seed: of the order of the windows.
        device: `cpu`, `cuda`, or `auto`: cuda if available.
        threads: torch's threads; None = one per physical core.
        memory: limit of activations in bytes: batches are split, layers computed twice.
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
                raise UsageError(f"distillation: {name} = {getattr(self, name)} must be at least 1")
        if not self.rate > 0:
            raise UsageError(f"distillation: rate = {self.rate} must be above 0")
        if not 0 <= self.warm_up < 1:
            raise UsageError(f"distillation: warm_up = {self.warm_up} must be in [0, 1)")
        if self.device not in {"auto", "cpu", "cuda"}:
            raise UsageError(f"distillation: device = {self.device!r} must be auto, cpu or cuda")

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
        validation: divergence on the held-out windows after it, with rounded factors; None = not measured.
    """

    number: int
    loss: float
    validation: float | None = None


@dataclass(frozen=True)
class Distilled:
    """The outcome.

    Attributes:
        factors: by source name, rounded; the initial ones if training did not help.
        before: divergence from the original on the held-out windows, nats per token, with the initial factors.
        after: with `factors`; equal to `before` unless `improved`.
        best: number of the step that `factors` are from; 0 = the start.
        history: every step taken.
        ended: `steps` (all taken), `patience` (no new best for long) or `diverged` (a loss that is not finite).
        tokens: trained on; a window that is used twice counts twice.
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
        """Whether any step was better than the start; otherwise everything was rolled back."""
        return self.best > 0

    def __str__(self) -> str:
        taken = f"{len(self.history)} steps ({self.tokens:,} tokens, ended by {self.ended})"
        if not self.improved:
            return f"rolled back to the start: {taken} did not lower the KLD on held-out windows, {self.before:.5f}"
        return f"KLD on held-out windows {self.before:.5f} -> {self.after:.5f} at step {self.best} of {taken}"


def held_out(windows: int) -> int:
    """Number of the windows, the last ones, that are kept for validation.

    Raises:
        UsageError: none would be left to train on.
    """
    least = LEAST_HELD_OUT + 1
    if windows < least:
        raise UsageError(f"distillation: {windows} calibration windows; {least} are the least, more text is needed")
    return max(LEAST_HELD_OUT, windows // HELD_OUT)


class Trainer(Protocol):
    """A module that a runtime names as its `TRAINER`; each function raises MissingDependencyError, CheckpointError."""

    @property
    def NAME(self) -> str:  # noqa: N802
        """Name under which manifests keep its version."""
        ...

    def version(self) -> str:
        """Versions of the libraries behind it."""
        ...

    def engine(self, checkpoint: Checkpoint, *, threads: int | None = None) -> Engine:
        """An engine for `checkpoint`; `threads` None = one per physical core."""
        ...

    def distil(
        self,
        folder: Path,
        frozen: Iterable[tuple[str, NDArray[np.float32]]],
        trained: Mapping[str, AffineBlocks],
        windows: NDArray[np.int32],
        teacher: Teacher,
        *,
        settings: DistilSettings,
        rounded: Rounding,
        progress: Callable[[Step], None] | None = None,
    ) -> Distilled:
        """Train the factors of quantized matrices until the model predicts what the original predicted.

        The last sixteenth of the windows, at least two, is not trained on: it decides which step's factors are kept.

        Args:
            folder: the checkpoint; only its config.json is read.
            frozen: (source name, values) of every other tensor, as the file will hold them; consumed one at a time.
            trained: the matrices by source name; of a tied model the embedding also serves as the head.
            windows: [n, w] token ids, at least three windows.
            teacher: the original's predictions on them; indexed by window, so it may be memory-mapped.
            settings: how to train.
            rounded: rounds factors to those that a file can hold; validation uses only these.
            progress: called after every step.

        Returns:
            Rounded factors, better than the initial ones, or these if no step was.

        Raises:
            UsageError: too few windows, mismatched shapes, a tensor given twice, an unavailable device.
            TensorError: a name in `trained` is not the weight of a matrix.
        """
        ...

    def sensitivity(
        self, folder: Path, windows: NDArray[np.int32], seed: int = 0, threads: int | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """How strongly the predictions react to an error in each output of each matrix: the Fisher diagonal.

        Args:
            folder: the checkpoint, loaded whole, in float32.
            windows: [n, w] token ids; a dozen windows suffice.
            seed: of the tokens that are drawn.
            threads: None = one per physical core.

        Returns:
            By source name the mean over tokens of the squared gradient of log p(y | context), y drawn from the model,
            with respect to each output of the matrix; for `lm_head.weight` of p (1 - p), whether or not the head is
            tied; for the embedding with respect to each column of the looked-up rows.
        """
        ...

    def divergence(
        self,
        folder: Path,
        weights: Iterable[tuple[str, NDArray[np.float32]]],
        windows: NDArray[np.int32],
        teacher: Teacher,
        threads: int | None = None,
    ) -> float:
        """Mean divergence of a model with other weights from the original's predictions, nats per token.

        Of `folder` only config.json is read; `weights`, (source name, values) of all tensors, are consumed in order.
        """
        ...

"""Accuracy of a candidate's predictions against the reference's: llama-perplexity's statistics, streamed.

Both sides are logits of the same positions.  With b and q the log-probabilities of reference and candidate,
t the true next token and n the number of positions:

    divergence of a position   sum of exp(b) (b - q) over the tokens with b > -16; natural log, nats per token
    perplexity                 exp(mean of -q[t]); its error is the mean's standard error times the perplexity
    ln of the ratio            mean of b[t] - q[t].  Its variance is var(q[t]) + var(b[t]) - 2 cov(q[t], b[t]),
                               which is the variance of the difference: that is what is accumulated
    same top token             both first maxima agree; error sqrt(p (1 - p) / (n - 1))
    Δp                         exp(q[t]) - exp(b[t]), the true token's probability: mean and root mean square
    percentiles                linear interpolation at p (n - 1) in the sorted divergences

The cutoff at -16 is llama.cpp's definition, kept so that the figures are comparable.  The excluded tokens hold at most
v e^-16 of the reference's probability (1.7 % for 151,936 tokens of exactly that likelihood, in practice far less), so
the sum over the others may be slightly below zero for two nearly equal models.
Everything is computed in float64 from float32 logits; unlike in llama.cpp no intermediate result is stored in 16 bits.

Notation: n = positions, v = vocab_size, k = length of a top list (5, or v if that is less).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import FileFormatError, UsageError
from smolexport.parity import results
from smolexport.parity.results import Accuracy, Estimate

LOG_PROBABILITY_FLOOR = -16.0
TOP_TOKENS = 5
COLUMNS = 5  # figures per position
RUNS = 16  # most runs of positions in `by_position`
# logits converted to float64 at a time: 2 MB fit in a core's cache
_SLICE = 1 << 18

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """A block of logits and the figures from one pass over it.  All candidates share the reference's.

    Attributes:
        logits: [n, v] float32.
        log_sum: [n] float64, ln of the sum of exp over the row.
        nll: [n] float64, minus the log-probability of the token that follows, nats.
        top: [n, k] int64, the most likely tokens, best first; of equals the lowest id comes first.
    """

    logits: NDArray[np.float32]
    log_sum: Float64
    nll: Float64
    top: NDArray[np.int64]


def read_predictions(logits: NDArray[np.float32], following: NDArray[np.integer]) -> Predictions:
    """Make the pass over `logits` [n, v] whose true next tokens are `following` [n].

    Raises UsageError if the shapes or the ids do not fit.
    """
    if logits.ndim != 2 or following.shape != logits.shape[:1] or not logits.size:
        raise UsageError(f"logits of shape {logits.shape} do not match next tokens of shape {following.shape}")
    if following.min() < 0 or following.max() >= logits.shape[1]:
        raise UsageError(f"next token {following.max()} is outside the vocabulary of {logits.shape[1]} tokens")
    log_sum = np.empty(len(logits))
    top = np.empty((len(logits), min(TOP_TOKENS, logits.shape[1])), dtype=np.int64)
    # a damaged file may produce infinities and NaN; they must reach the figures, not raise
    with np.errstate(invalid="ignore", over="ignore"):
        for part in _slices(logits):
            rows = logits[part]
            top[part] = _top(rows, top.shape[1])
            best = np.take_along_axis(rows, top[part, :1], axis=1).astype(np.float64)
            shifted = rows - best
            log_sum[part] = np.log(np.exp(shifted, out=shifted).sum(axis=1)) + best[:, 0]
        chosen = np.take_along_axis(logits, following.astype(np.int64)[:, None], axis=1)[:, 0]
        return Predictions(logits, log_sum, log_sum - chosen, top)


def percentile(ordered: Float64, share: float) -> float:
    """The value below which `share` (0 to 1) of the ascending values `ordered` [n] lie.

    Interpolates linearly at place share * (n - 1).
    """
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    weight = place - low
    # an infinite neighbour of weight 0 must not turn a finite value into NaN
    return float(ordered[low] if weight == 0 else ordered[low] * (1 - weight) + ordered[high] * weight)


class Accumulator:
    """Accumulates a candidate's blocks in order; keeps five float64 per position."""

    def __init__(self) -> None:
        self._parts: list[Float64] = []

    def add(self, reference: Predictions, candidate: Predictions) -> None:
        """Add the next block: the same positions on both sides.  Raises UsageError if the shapes differ."""
        if reference.logits.shape != candidate.logits.shape:
            raise UsageError(
                f"shapes of logits differ: reference {reference.logits.shape}, candidate {candidate.logits.shape}"
            )
        with np.errstate(invalid="ignore", over="ignore"):
            shared = (reference.top[:, :, None] == candidate.top[:, None, :]).any(axis=2)
            columns = (
                _divergence(reference, candidate),
                reference.top[:, 0] == candidate.top[:, 0],
                shared.mean(axis=1),
                reference.nll,
                candidate.nll,
            )
        self._parts.append(np.array(columns, np.float64))

    def save(self, path: Path) -> None:
        """Write the blocks so far to the file `path`, for `load`."""
        path.write_bytes(np.concatenate(self._parts, axis=1).astype("<f8").tobytes())

    @classmethod
    def load(cls, path: Path) -> Accumulator:
        """Read what `save` wrote.  Raises FileFormatError if it is damaged."""
        found = cls()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be read ({error.strerror}); delete it") from error
        if not data or len(data) % (8 * COLUMNS):
            raise FileFormatError(f"{path}: is damaged; delete it")
        found._parts.append(np.frombuffer(data, "<f8").reshape(COLUMNS, -1))
        return found

    def result(self) -> Accuracy:
        """The figures over all blocks so far.  Raises UsageError if there is none."""
        if not self._parts:
            raise UsageError("no position was scored")
        divergence, same_top, shared, reference_nll, nll = np.concatenate(self._parts, axis=1)
        n = len(divergence)
        with np.errstate(invalid="ignore", over="ignore"):
            same = float(same_top.mean())
            gap, delta_p = nll - reference_nll, np.exp(-nll) - np.exp(-reference_nll)
            return Accuracy(
                positions=n,
                kld=_spread(divergence),
                top1_agreement=Estimate(same, float(np.sqrt(same * (1 - same) / (n - 1))) if n > 1 else float("nan")),
                top5_overlap=float(shared.mean()),
                reference_perplexity=_perplexity(_mean(reference_nll)),
                perplexity=_perplexity(_mean(nll)),
                perplexity_ratio=_perplexity(_mean(gap)),
                ln_perplexity_ratio=_mean(gap),
                delta_p=results.DeltaP(_mean(delta_p), _root(_mean(delta_p**2))),
                kld_histogram=histogram(divergence),
                divergences=divergence,
                same_top=same_top.astype(np.bool_),
            )


def histogram(divergences: Float64) -> results.Histogram:
    """Count `divergences` [n] between the edges `KLD_EDGES`; a bin holds its lower edge, not its upper one."""
    finite = divergences[np.isfinite(divergences)]
    bins = np.searchsorted(np.array(results.KLD_EDGES), finite, side="right")
    below, *counts, above = np.bincount(bins, minlength=len(results.KLD_EDGES) + 1).tolist()
    return results.Histogram(below, tuple(counts), above, len(divergences) - len(finite))


def by_position(accuracy: Accuracy, text: results.TextInfo) -> results.ByPosition | None:
    """Mean divergence and top-1 agreement over runs of neighbouring positions, over all windows.

    There are at most `RUNS` runs of nearly equal length, because single positions are noisy with few windows.  None if
    the positions do not form whole windows.
    """
    scored = text.scored_per_window
    if scored < 1 or accuracy.positions % scored or len(accuracy.divergences) != accuracy.positions:
        return None
    kld = accuracy.divergences.reshape(-1, scored).mean(axis=0)
    same = accuracy.same_top.reshape(-1, scored).mean(axis=0)
    runs = np.array_split(np.arange(scored), min(RUNS, scored))
    return results.ByPosition(
        tokens_before=tuple(text.window - scored + int(run[0]) for run in runs),
        kld=tuple(float(kld[run].mean()) for run in runs),
        top1_agreement=tuple(float(same[run].mean()) for run in runs),
    )


def _mean(values: Float64) -> Estimate:
    """Mean and its standard error, NaN for a single value."""
    n = len(values)
    return Estimate(float(values.mean()), float(values.std() / np.sqrt(n - 1)) if n > 1 else float("nan"))


def _slices(logits: NDArray[np.float32]) -> Iterator[slice]:
    rows = max(1, _SLICE // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _top(rows: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest of each row, first maximum first: [n, count]."""
    # repeated argmax is far cheaper than a partition for five of 150,000, and its order of equals is defined
    rest = rows.copy()
    ids = np.empty((len(rows), count), dtype=np.int64)
    for place in range(count):
        ids[:, place] = rest.argmax(axis=1)
        np.put_along_axis(rest, ids[:, place : place + 1], -np.inf, axis=1)
    return ids


def _divergence(reference: Predictions, candidate: Predictions) -> Float64:
    """Divergence of each position: [n]."""
    total = np.empty(len(reference.logits))
    for part in _slices(reference.logits):
        base = reference.logits[part] - reference.log_sum[part, None]
        gap = base - (candidate.logits[part] - candidate.log_sum[part, None])
        # not `base > floor`: a NaN must stay in the sum
        np.copyto(gap, 0.0, where=base <= LOG_PROBABILITY_FLOOR)
        total[part] = np.einsum("ij,ij->i", np.exp(base, out=base), gap)
    return total


def _spread(divergence: Float64) -> results.Spread:
    ordered = np.sort(divergence)
    median, p90, p95, p99, p99_9 = (percentile(ordered, share) for share in (0.5, 0.9, 0.95, 0.99, 0.999))
    return results.Spread(_mean(divergence), median, p90, p95, p99, p99_9, float(divergence.max()))


def _perplexity(mean: Estimate) -> Estimate:
    """Exponential of a mean, with its error to first order; of a mean difference, it is the ratio of perplexities."""
    value = float(np.exp(mean.value))
    return Estimate(value, value * mean.error)


def _root(square: Estimate) -> Estimate:
    """Square root with its error to first order; zero has no error."""
    value = float(np.sqrt(square.value))
    return Estimate(value, 0.5 / value * square.error if value else 0.0)

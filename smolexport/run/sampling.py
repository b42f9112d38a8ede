"""Choosing the next token from a row of logits.

The steps and their order are llama.cpp's: repetition penalty, top-k, top-p, min-p, temperature, draw.  So top-p and
min-p see the model's own probabilities, before the temperature (transformers applies the temperature first).
Everything is computed in float64 and each token consumes one uniform number, so the same logits and seed give the same
tokens on every runtime.

Notation: v = vocab_size, c = candidates left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import SessionError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.  The defaults are greedy.

    Args:
        temperature: 0 takes the most probable token; the filters below then change nothing.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest most probable tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens at least this fraction as probable as the best one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of recent tokens (Keskar et al. 2019).
        penalty_window: how many recent tokens, prompt included, the penalty applies to; None: all.
        seed: of the random numbers.

    Raises:
        UsageError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    penalty_window: int | None = 64
    seed: int = 0

    def __post_init__(self) -> None:
        limits = (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 and finite"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 and finite (1 does nothing)"),
            ("penalty_window", self.penalty_window is None or self.penalty_window >= 0, "at least 0, or None for all"),
            ("seed", self.seed >= 0, "at least 0"),
        )
        for name, valid, range_ in limits:
            if not valid:
                raise UsageError(f"{name} = {getattr(self, name)} must be {range_}")


class Sampler:
    """`Sampling` with its random state: one per generation."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def choose(self, logits: NDArray[np.float32], history: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: [v], as the runtime computed them; -inf forbids a token.
            history: tokens so far, prompt included, for the repetition penalty.

        Raises:
            SessionError: NaN or +inf among the logits, or nothing but -inf.
        """
        s = self._sampling
        best = float(np.max(logits))
        if not math.isfinite(best):  # np.max propagates NaN
            raise SessionError(
                f"the runtime's logits are not finite (their maximum is {best}); the file may be damaged"
            )
        if s.temperature == 0 and s.repetition_penalty == 1:
            return int(np.argmax(logits))
        scores = np.asarray(logits, np.float64)
        if s.repetition_penalty != 1:
            recent = history if s.penalty_window is None else history[max(0, len(history) - s.penalty_window) :]
            scores = penalize(scores, recent, s.repetition_penalty)
        if s.temperature == 0:
            return int(np.argmax(scores))
        ids = self._candidates(scores)
        return int(ids[self._draw(probabilities(scores[ids], s.temperature))])

    def _candidates(self, scores: NDArray[np.float64]) -> NDArray[np.intp]:
        """Ids that the filters keep, ascending; each filter sees what the previous one kept."""
        s, ids = self._sampling, np.arange(len(scores))
        if s.top_k > 0:
            ids = ids[top_k_mask(scores[ids], s.top_k)]
        if s.top_p < 1:
            ids = ids[top_p_mask(scores[ids], s.top_p)]
        if s.min_p > 0:
            ids = ids[min_p_mask(scores[ids], s.min_p)]
        return ids

    def _draw(self, chances: NDArray[np.float64]) -> int:
        """Index by the inverse of the distribution function, in order of token id.

        In that order, not by rank: two runtimes whose logits differ in the last digits may rank near ties
        differently, but their distribution functions stay close everywhere.
        """
        bounds = np.cumsum(chances)
        index = int(np.searchsorted(bounds, self._random.random() * bounds[-1], side="right"))
        return min(index, int(np.flatnonzero(chances)[-1]))  # rounding must not go past the last possible one


def penalize(logits: NDArray[np.float64], tokens: Sequence[int], penalty: float) -> NDArray[np.float64]:
    """A copy of `logits` [v] in which each distinct token of `tokens` is less likely (more likely if penalty < 1)."""
    result = logits.copy()
    seen = np.unique(np.asarray(tokens, np.int64))
    values = result[seen]
    result[seen] = np.where(values > 0, values / penalty, values * penalty)
    return result


def top_k_mask(logits: NDArray[np.float64], k: int) -> NDArray[np.bool_]:
    """Mask of the k largest `logits` [c]; exactly min(k, c), the first ones among equals."""
    if k >= len(logits):
        return np.ones(len(logits), np.bool_)
    bound = np.partition(logits, len(logits) - k)[len(logits) - k]
    kept = np.asarray(logits > bound)
    kept[np.flatnonzero(logits == bound)[: k - int(kept.sum())]] = True
    return kept


def top_p_mask(logits: NDArray[np.float64], p: float) -> NDArray[np.bool_]:
    """Mask of the fewest most probable `logits` [c] whose probabilities sum to at least p; never empty."""
    chances = probabilities(logits)
    # Tokens below (1 - p) / c sum to less than 1 - p, so the set is among the others: usually a few dozen to sort.
    # Half of that, so that rounding cannot matter.
    pool = np.flatnonzero(chances >= (1 - p) / len(chances) / 2)
    order = pool[np.argsort(-chances[pool], kind="stable")]
    count = int(np.searchsorted(np.cumsum(chances[order]), p, side="left")) + 1
    kept = np.zeros(len(logits), np.bool_)
    kept[order[:count]] = True
    return kept


def min_p_mask(logits: NDArray[np.float64], p: float) -> NDArray[np.bool_]:
    """Mask of the `logits` [c] at least p times as probable as the best."""
    return np.asarray(np.exp(logits - logits.max()) >= p)


def probabilities(logits: NDArray[np.float64], temperature: float = 1.0) -> NDArray[np.float64]:
    """Softmax of logits / temperature, [c] -> [c]."""
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, which is right
        weights = np.exp((logits - logits.max()) / temperature)
    return np.asarray(weights / weights.sum())

"""What a file's many positions come to: a histogram of their divergence, and runs of positions within the window."""

from __future__ import annotations

from typing import Any

import numpy as np

from smolexport.parity.results import Accuracy, TextFacts

__all__ = ["EDGES", "RUNS", "by_position", "histogram"]

# nats per token, four bins a decade: from what two float32 runtimes differ by to a wholly wrong prediction
EDGES: tuple[float, ...] = tuple(float(f"{10 ** (place / 4):.4g}") for place in range(-36, 9))
RUNS = 16


def histogram(accuracy: Accuracy) -> dict[str, Any]:
    """Positions whose divergence lies between two neighbours of `EDGES`, and those that lie outside or nowhere.

    A bin holds its lower edge, not its upper one.  `below` counts zeros and the hair below zero that the statistic's
    cut allows; `not_finite` counts positions where a damaged file gave NaN or infinities.
    """
    values = accuracy.divergences
    finite = values[np.isfinite(values)]
    places = np.searchsorted(np.array(EDGES), finite, side="right")
    counts = np.bincount(places, minlength=len(EDGES) + 1)
    return {
        "below": int(counts[0]),
        "counts": [int(count) for count in counts[1:-1]],
        "above": int(counts[-1]),
        "not_finite": int(len(values) - len(finite)),
    }


def by_position(accuracy: Accuracy, text: TextFacts) -> dict[str, Any] | None:
    """Mean divergence and agreement over runs of neighbouring positions, all windows together.

    `tokens_before` is the number of the window's tokens before the first position of each run.  There are at most
    `RUNS` runs, nearly equal in length: single positions are noise where windows are few.  None where the positions
    are not those of whole windows.
    """
    if text.scored < 1 or accuracy.positions % text.scored or len(accuracy.divergences) != accuracy.positions:
        return None
    kld = accuracy.divergences.reshape(-1, text.scored).mean(axis=0)
    same = accuracy.same_top.reshape(-1, text.scored).mean(axis=0)
    runs = np.array_split(np.arange(text.scored), min(RUNS, text.scored))
    return {
        "tokens_before": [int(text.window - text.scored + run[0]) for run in runs],
        "kld": [_finite(float(kld[run].mean())) for run in runs],
        "top1": [_finite(float(same[run].mean())) for run in runs],
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None

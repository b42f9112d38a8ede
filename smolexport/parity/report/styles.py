"""Style of each file in all charts, and which values can be drawn.

The colour shows the format; among files of one format, dashes and marker show scheme and method in the order of bits
per weight, so that a scheme and method looks alike in all formats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smolexport.parity.report.names import short_power
from smolexport.parity.report.svg import INKS, SERIES
from smolexport.parity.results import CandidateResult, Comparison, ModelInfo

WIDE = 9.6
"""Width in inches of a chart as wide as the page."""

DASHES: tuple[Any, ...] = (
    "-", (0, (4, 1.5)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
)  # fmt: skip
"""Line dashes, plainest first."""

_MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Style:
    """Name, colour, dashes and marker of a file."""

    name: str
    colour: str
    dashes: Any
    marker: str


Shown = Sequence[tuple[CandidateResult, Style]]
"""Files with their styles."""


def styled(comparison: Comparison) -> Shown:
    """All candidates with their styles."""
    files = comparison.candidates
    return list(zip(files, styles_of([file.model for file in files]), strict=True))


def styles_of(models: Sequence[ModelInfo]) -> list[Style]:
    """A style for each model."""
    formats = list(dict.fromkeys(model.format for model in models))
    found = []
    for model in models:
        kinds = sorted({_kind(one) for one in models if one.format == model.format})
        rank = kinds.index(_kind(model))
        colour = INKS[f"series-{formats.index(model.format) % SERIES}"]
        found.append(Style(shorter(model.name), colour, DASHES[rank % len(DASHES)], _MARKERS[rank % len(_MARKERS)]))
    return found


def method_rank(method: str | None) -> int:
    """Rank of a method, plainest first; None is plain rounding."""
    from smolexport.calibration.methods import methods

    names = list(methods())
    return names.index(method) if method in names else 0 if method is None else len(names)


def _kind(model: ModelInfo) -> tuple[float, int, str, int, str]:
    """What distinguishes files of one format, in the order of their styles: size, scheme, method."""
    bits = -round(model.bits_per_weight, 1)
    return bits, len(model.scheme), model.scheme, method_rank(model.method), model.method or ""


def shorter(name: str, most: int = 34) -> str:
    """A long name without its middle; the end shows the scheme."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def drawable(value: float) -> bool:
    """Whether a log scale can show `value`."""
    return math.isfinite(value) and value > 0


def floor_of(comparison: Comparison) -> float | None:
    """Mean divergence of the noise floor, if a log scale can show it."""
    floor = comparison.reference.noise_floor
    return floor.kld.mean.value if floor and drawable(floor.kld.mean.value) else None


def figure_text(value: float) -> str:
    """A figure in an alternative text."""
    return short_power(f"{value:.2g}") if math.isfinite(value) else "unknown"

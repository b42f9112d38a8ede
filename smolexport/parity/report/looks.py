"""How a file is drawn wherever it is, and what can be drawn at all.

A colour is a format; among the files of one format the line's dashes and the mark's shape tell schemes and methods
apart, in the order of bits per weight, so that one scheme and method looks alike in all formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smolexport.parity.report.names import short_power
from smolexport.parity.report.svg import INKS, SERIES

__all__ = [
    "DASHES",
    "WIDE",
    "Look",
    "Sheet",
    "drawable",
    "figure_text",
    "floor_of",
    "looks_of",
    "method_rank",
    "shorter",
]

Sheet = Mapping[str, Any]
WIDE = 9.6
"""Inches of a chart as wide as the page."""

DASHES: tuple[Any, ...] = (
    "-", (0, (4, 1.5)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
)  # fmt: skip
"""Of lines, from the plainest on."""

_MARKS = "osD^vPX*"


@dataclass(frozen=True)
class Look:
    """Name, colour, dashes and mark of a file."""

    name: str
    colour: str
    dashes: Any
    mark: str


def looks_of(sheet: Sheet) -> list[Look]:
    """A look for each candidate."""
    files = sheet["candidates"]
    formats = list(dict.fromkeys(file["format"] for file in files))
    found = []
    for file in files:
        place = formats.index(file["format"])
        kinds = sorted({_kind(f) for f in files if f["format"] == file["format"]})
        rank = kinds.index(_kind(file))
        found.append(
            Look(
                shorter(file["name"]),
                INKS[f"series-{place % SERIES}"],
                DASHES[rank % len(DASHES)],
                _MARKS[rank % len(_MARKS)],
            )
        )
    return found


def method_rank(method: str | None) -> int:
    """Place of a method among all, from the plainest on; None is that of a plain file."""
    from smolexport.calibration.methods import methods

    names = list(methods())
    return names.index(method) if method in names else 0 if method is None else len(names)


def _kind(file: Sheet) -> tuple[float, int, str, int, str]:
    """What tells files of one format apart, in the order of their looks: size, scheme, method."""
    bits, scheme, method = -round(file["bits_per_weight"] or 0, 1), file["scheme"], file["method"]
    return bits, len(scheme), scheme, method_rank(method), method or ""


def shorter(name: str, most: int = 34) -> str:
    """Middle left out of a long name: its end tells the scheme."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def drawable(value: float | None) -> bool:
    """Whether a figure has a place on a log scale."""
    return value is not None and value > 0


def floor_of(sheet: Sheet) -> float | None:
    """Mean divergence of the noise floor, where it can stand on a log scale."""
    floor = sheet["reference"]["noise_floor"]
    value = floor["kld"]["mean"] if floor else None
    return value if drawable(value) else None


def figure_text(value: float | None) -> str:
    """A figure in an alternative text."""
    return "unknown" if value is None else short_power(f"{value:.2g}")

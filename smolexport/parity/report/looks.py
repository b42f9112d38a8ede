"""How a file is drawn wherever it is, and what can be drawn at all.

A colour is a format; among the files of one format the line's dashes and the mark's shape tell the schemes apart, in
the order of bits per weight, so that one scheme looks alike in all formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smolexport.parity.report.names import short_power
from smolexport.parity.report.svg import INKS, SERIES

__all__ = ["WIDE", "Look", "Sheet", "drawable", "figure_text", "floor_of", "looks_of", "shorter"]

Sheet = Mapping[str, Any]
WIDE = 9.6
"""Inches of a chart as wide as the page."""

_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1)))
_MARKS = "osD^v"


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
        schemes = {(f["scheme"], -round(f["bits_per_weight"] or 0, 1)) for f in files if f["format"] == file["format"]}
        mine = file["scheme"], -round(file["bits_per_weight"] or 0, 1)
        rank = sorted(schemes, key=lambda one: (one[1], len(one[0]), one[0])).index(mine)
        found.append(
            Look(
                shorter(file["name"]),
                INKS[f"series-{place % SERIES}"],
                _DASHES[rank % len(_DASHES)],
                _MARKS[rank % len(_MARKS)],
            )
        )
    return found


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

"""Methods of calibration side by side: files of one format, scheme and size that differ in nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from smolexport.calibration.methods import methods as known_methods
from smolexport.parity.results import CandidateResult, Estimate

__all__ = ["PLAIN", "Cell", "Row", "columns", "side_by_side"]

PLAIN = "rtn"
"""Method of files that name none."""


@dataclass(frozen=True)
class Cell:
    """A file's divergence, and its ratio to the plainly rounded file's, None where there is none.

    `candidate` is the file's place in `Comparison.candidates`.
    """

    method: str
    candidate: int
    kld: Estimate
    ratio: float | None


@dataclass(frozen=True)
class Row:
    """Files of one format, scheme, runtime and mean of bits, a cell for each method that is there."""

    format: str
    scheme: str
    runtime: str
    bits_per_weight: float
    cells: tuple[Cell, ...]


def side_by_side(candidates: Sequence[CandidateResult]) -> tuple[Row, ...]:
    """A row for all that comes in at least two methods; a second file of one method opens another row."""
    groups: dict[tuple[str, str, str, float], list[dict[str, int]]] = {}
    for place, result in enumerate(candidates):
        model = result.model
        # metadata aside, methods change no byte of a file's size
        key = model.format, model.scheme, model.runtime.NAME, round(model.bits_per_weight, 2)
        method, rows = model.method or PLAIN, groups.setdefault(key, [])
        free = next((row for row in rows if method not in row), None)
        if free is None:
            rows.append({method: place})
        else:
            free[method] = place
    return tuple(_row(key, row, candidates) for key, rows in groups.items() for row in rows if len(row) > 1)


def columns(methods: Iterable[str]) -> list[str]:
    """Each of `methods` once, from the plainest on."""
    there, known = dict.fromkeys(methods), known_methods()
    return [*(name for name in known if name in there), *(name for name in there if name not in known)]


def _row(key: tuple[str, str, str, float], row: dict[str, int], candidates: Sequence[CandidateResult]) -> Row:
    klds = {method: candidates[place].accuracy.kld.mean for method, place in row.items()}
    plain = klds[PLAIN].value if PLAIN in klds else 0.0
    cells = (
        Cell(method, place, klds[method], klds[method].value / plain if plain > 0 else None)
        for method, place in row.items()
    )
    return Row(*key, tuple(cells))

"""Calibration methods side by side: files of one format, scheme and size that differ only in their method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from smolexport.calibration.methods import methods as known_methods
from smolexport.parity.results import CandidateResult, MethodFile, MethodRow

PLAIN = "rtn"
"""Method of files that name none: plain rounding to nearest."""


def side_by_side(candidates: Sequence[CandidateResult]) -> tuple[MethodRow, ...]:
    """One row per group with at least two methods; a second file of the same method starts another row."""
    groups: dict[tuple[str, str, str, float], list[dict[str, int]]] = {}
    for place, result in enumerate(candidates):
        model = result.model
        # apart from metadata, the method does not change a file's size
        key = model.format, model.scheme, model.runtime, round(model.bits_per_weight, 2)
        method, rows = model.method or PLAIN, groups.setdefault(key, [])
        free = next((row for row in rows if method not in row), None)
        if free is None:
            rows.append({method: place})
        else:
            free[method] = place
    return tuple(_row(key, row, candidates) for key, rows in groups.items() for row in rows if len(row) > 1)


def columns(methods: Iterable[str]) -> list[str]:
    """Each of `methods` once, plainest first."""
    there, known = dict.fromkeys(methods), known_methods()
    return [*(name for name in known if name in there), *(name for name in there if name not in known)]


def _row(key: tuple[str, str, str, float], row: dict[str, int], candidates: Sequence[CandidateResult]) -> MethodRow:
    klds = {method: candidates[place].accuracy.kld.mean for method, place in row.items()}
    plain = klds[PLAIN].value if PLAIN in klds else 0.0
    files = (
        MethodFile(method, place, klds[method], klds[method].value / plain if plain > 0 else None)
        for method, place in row.items()
    )
    return MethodRow(*key, tuple(files))

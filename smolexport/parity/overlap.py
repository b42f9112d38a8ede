"""Evaluation text that a calibrated file has seen: a comparison on it would praise what was learned by heart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smolexport.calibration.statistics import Statistics
from smolexport.calibration.texts import Source, overlaps
from smolexport.errors import UsageError
from smolexport.parity.inputs import Candidate
from smolexport.parity.windows import Window
from smolexport.text import label

__all__ = ["MOST", "RUN", "Overlap", "check_runs", "check_sources", "check_texts", "note_on"]

RUN = 32  # tokens in a row that no two texts share by chance
MOST = 0.01  # share of the scored runs that may be common all the same: a licence, a heading, a quotation
OTHER = "compare on text that calibration has not seen, with --text"


@dataclass(frozen=True)
class Overlap:
    """Runs of `RUN` scored tokens, and how many of them stand in the calibration text too."""

    runs: int
    shared: int


def check_texts(candidates: Sequence[Candidate], *texts: bytes) -> None:
    """Refuse a text that is one of those a candidate was calibrated on, byte by byte.

    Args:
        candidates: plain files among them have seen no text.
        texts: one text in all the forms that may have been hashed, e.g. with either line end.

    Raises:
        UsageError: names the file and the calibration text.
    """
    for candidate in candidates:
        if candidate.calibration:
            check_sources(candidate.calibration.sources, str(candidate.path), *texts)


def check_sources(sources: Sequence[Source], owner: str, *texts: bytes) -> None:
    """Refuse a text that is one of `sources`, on which `owner` was calibrated; raises UsageError."""
    marks = {hashlib.sha256(text).hexdigest() for text in texts}
    for source in sources:
        if source.sha256 in marks:
            raise UsageError(f"{owner}: was calibrated on the very text to be scored ({label(source.name)}); {OTHER}")


def check_runs(statistics: Statistics, windows: Sequence[Window]) -> Overlap:
    """What the scored tokens of `windows` share with the calibration's windows.

    Raises:
        UsageError: more than `MOST` of the runs of `RUN` tokens.
        CalibrationError: the calibration's windows cannot be read.
    """
    # a number that is no token between what is not neighbouring
    scored = np.concatenate([np.append(window.following, -1) for window in windows])
    runs = sum(max(0, window.scored - RUN + 1) for window in windows)
    found = Overlap(runs, overlaps(statistics.windows(), scored, RUN))
    if found.shared > MOST * runs:
        raise UsageError(
            f"{statistics.folder}: {found.shared:,} of the {runs:,} runs of {RUN} scored tokens stand in the "
            f"calibration text too, more than {MOST:.0%}; {OTHER}"
        )
    return found


def note_on(statistics: Statistics, candidates: Sequence[Candidate], found: Overlap) -> tuple[str, ...]:
    """What a reader should know of the check: shared runs, what it could not see, files of other statistics."""
    notes = []
    if not found.runs:
        notes.append(
            f"windows score fewer than {RUN} tokens each: runs shared with the calibration text cannot be seen"
        )
    else:
        notes.append(
            f"{found.shared:,} of the {found.runs:,} runs of {RUN} scored tokens stand in the calibration text too"
        )
    strange = [
        candidate.path.name
        for candidate in candidates
        if candidate.calibration and candidate.calibration.windows_sha256 != statistics.manifest.sha256
    ]
    if strange:
        names = ", ".join(dict.fromkeys(strange))
        notes.append(
            f"{names}: calibrated on other text than {statistics.folder} holds: whether it shares runs with the scored "
            "text is not known"
        )
    return tuple(notes)

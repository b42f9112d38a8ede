"""Detection of evaluation text that a file was calibrated on; figures on such text would be too good."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smolexport.calibration.statistics import Statistics
from smolexport.calibration.texts import TextSource, overlaps
from smolexport.errors import UsageError
from smolexport.parity.inputs import Candidate
from smolexport.parity.windows import Window
from smolexport.text import label

RUN = 32  # tokens in a row that two texts do not share by chance
MOST = 0.01  # tolerated share of common runs: a licence, a heading, a quotation
OTHER = "use --text with text that calibration has not seen"


@dataclass(frozen=True)
class Overlap:
    """Number of runs of `RUN` scored tokens, and how many of them also occur in the calibration text."""

    runs: int
    shared: int


def check_texts(candidates: Sequence[Candidate], *texts: bytes) -> None:
    """Raise if the text is, byte for byte, a calibration text of a candidate.

    Args:
        candidates: files; plain ones have no calibration text.
        texts: one text in all forms that may have been hashed, e.g. with either line end.

    Raises:
        UsageError: names the file and the calibration text.
    """
    for candidate in candidates:
        if candidate.calibration:
            check_sources(candidate.calibration.sources, str(candidate.path), *texts)


def check_sources(sources: Sequence[TextSource], owner: str, *texts: bytes) -> None:
    """Raise UsageError if the text is one of `sources`, the calibration texts of `owner`."""
    marks = {hashlib.sha256(text).hexdigest() for text in texts}
    for source in sources:
        if source.sha256 in marks:
            raise UsageError(f"{owner}: was calibrated on the text to be scored ({label(source.name)}); {OTHER}")


def check_runs(statistics: Statistics, windows: Sequence[Window]) -> Overlap:
    """Count the runs of scored tokens that also occur in the calibration windows.

    Raises:
        UsageError: the share of such runs is above `MOST`.
        CalibrationError: the calibration's windows cannot be read.
    """
    # -1, which is not a token, separates windows
    scored = np.concatenate([np.append(window.following, -1) for window in windows])
    runs = sum(max(0, window.scored - RUN + 1) for window in windows)
    found = Overlap(runs, overlaps(statistics.windows(), scored, RUN))
    if found.shared > MOST * runs:
        raise UsageError(
            f"{statistics.folder}: {found.shared:,} of the {runs:,} runs of {RUN} scored tokens also occur in the "
            f"calibration text, more than {MOST:.0%}; {OTHER}"
        )
    return found


def note_on(statistics: Statistics, candidates: Sequence[Candidate], found: Overlap) -> tuple[str, ...]:
    """Notes on the check: shared runs, what it could not detect, files calibrated with other statistics."""
    notes = []
    if not found.runs:
        notes.append(
            f"windows score fewer than {RUN} tokens each: overlap with the calibration text cannot be detected"
        )
    else:
        notes.append(
            f"{found.shared:,} of the {found.runs:,} runs of {RUN} scored tokens also occur in the calibration text"
        )
    other = [
        candidate.path.name
        for candidate in candidates
        if candidate.calibration and candidate.calibration.windows_sha256 != statistics.manifest.sha256
    ]
    if other:
        names = ", ".join(dict.fromkeys(other))
        notes.append(
            f"{names}: calibrated on other text than that of {statistics.folder}; overlap with the scored text unknown"
        )
    return tuple(notes)

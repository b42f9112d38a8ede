"""Detection of evaluation text that a file was calibrated on; figures on such text would be too good."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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


def check_texts(candidates: Sequence[Candidate], *texts: bytes) -> None:
    """Raise UsageError if the text is, byte for byte, a calibration text of a candidate; see `check_sources`."""
    for candidate in candidates:
        if candidate.calibration:
            check_sources(candidate.calibration.sources, str(candidate.path), *texts)


def check_sources(sources: Sequence[TextSource], owner: str, *texts: bytes) -> None:
    """Raise UsageError if the text is one of `sources`, the calibration texts of `owner`.

    `texts` is the one text in all forms that may have been hashed, e.g. with either line end.
    """
    marks = {hashlib.sha256(text).hexdigest() for text in texts}
    for source in sources:
        if source.sha256 in marks:
            raise UsageError(f"{owner}: was calibrated on the text to be scored ({label(source.name)}); {OTHER}")


def check_runs(statistics: Statistics, windows: Sequence[Window]) -> tuple[int, int]:
    """Number of runs of `RUN` scored tokens that also occur in the calibration windows, and of all such runs.

    Raises:
        UsageError: the share of such runs is above `MOST`.
        CalibrationError: the calibration's windows cannot be read.
    """
    # -1, which is not a token, separates windows
    scored = np.concatenate([np.append(window.following, -1) for window in windows])
    runs = sum(max(0, window.scored - RUN + 1) for window in windows)
    shared = overlaps(statistics.windows(), scored, RUN)
    if shared > MOST * runs:
        raise UsageError(
            f"{statistics.folder}: {shared:,} of the {runs:,} runs of {RUN} scored tokens also occur in the "
            f"calibration text, more than {MOST:.0%}; {OTHER}"
        )
    return shared, runs


def notes_on(statistics: Statistics, candidates: Sequence[Candidate], shared: int, runs: int) -> list[str]:
    """Notes on what `check_runs` found, what it could not detect, and files calibrated with other statistics."""
    notes = [f"windows score fewer than {RUN} tokens each: overlap with the calibration text cannot be detected"]
    if runs:
        notes = [f"{shared:,} of the {runs:,} runs of {RUN} scored tokens also occur in the calibration text"]
    other = dict.fromkeys(
        candidate.path.name
        for candidate in candidates
        if candidate.calibration and candidate.calibration.windows_sha256 != statistics.manifest.sha256
    )
    if other:
        notes.append(
            f"{', '.join(other)}: calibrated on text other than that of {statistics.folder}; overlap with the scored "
            "text is unknown"
        )
    return notes

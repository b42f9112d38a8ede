"""How a file was calibrated: the record in its metadata, and the errors in the report beside it.

Both are untrusted input: anything malformed gives a note of one line and counts as absent.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolexport.calibration.texts import TextSource
from smolexport.conversion.source_model import CALIBRATION_KEY
from smolexport.files import open_regular
from smolexport.text import printable

LARGEST = 1 << 26  # bytes; a larger report is not read
LONGEST_METHOD = 40  # characters: it is a column heading


@dataclass(frozen=True)
class Record:
    """How a file was calibrated.

    Attributes:
        method: `imatrix`, `gptq`, `distil`.
        sources: the calibration texts.
        tokens: total number of tokens in their windows.
        windows_sha256: hash of the windows' token ids.
    """

    method: str
    sources: tuple[TextSource, ...] = field(default=(), repr=False)
    tokens: int = 0
    windows_sha256: str = field(default="", repr=False)


@dataclass(frozen=True)
class CalibrationEffect:
    """Squared error of a matrix's outputs on the calibration text, relative to the outputs.

    Attributes:
        source: the tensor's name in the checkpoint.
        layer: its layer; null outside the layers.
        kind: last part of its name, e.g. q_proj.
        before: error of rounding to nearest on the same scales.
        after: error of the file's method.
    """

    source: str
    layer: int | None
    kind: str
    before: float
    after: float


def read_calibration_record(metadata: Mapping[str, Any]) -> tuple[Record | None, str]:
    """The record in a file's metadata, None if absent or unreadable, and a note, empty if all is well."""
    if CALIBRATION_KEY not in metadata:
        return None, ""
    try:
        found = json.loads(str(metadata[CALIBRATION_KEY]))
        method, texts = found["method"], found.get("texts", [])
        if not isinstance(method, str) or not 0 < len(method) <= LONGEST_METHOD:
            raise ValueError("method is not a name")
        sources = tuple(TextSource(str(one["name"]), str(one["sha256"]), int(one["tokens"])) for one in texts)
        return Record(method, sources, int(found.get("tokens", 0)), str(found.get("windows_sha256", ""))), ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return None, f"metadata {CALIBRATION_KEY} cannot be read ({_short(error)}): treated as not calibrated"


def read_calibration_errors(path: Path, record: Record) -> tuple[tuple[CalibrationEffect, ...], str]:
    """The errors in the report beside `path`, none without a report, and a note, empty if all is well."""
    from smolexport.recipe import sidecar_of

    place = sidecar_of(path)
    try:
        if not place.exists():
            return (), ""
        if not place.is_file():  # reading a pipe could block for ever
            raise ValueError("not a regular file")
        if place.stat().st_size > LARGEST:
            raise ValueError("too large")
        with open_regular(place) as file:
            found = json.loads(file.read())
        if (found["method"], found["windows_sha256"]) != (record.method, record.windows_sha256):
            raise ValueError("it belongs to another file")
        return tuple(_effect(str(source), one) for source, one in found["tensors"].items()), ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return (
            (),
            f"{place.name}: cannot be read ({_short(error)}): the errors before and after calibration are not shown",
        )


def _effect(source: str, one: Mapping[str, Any]) -> CalibrationEffect:
    before, after = float(one["before"]), float(one["after"])
    if not (math.isfinite(before) and math.isfinite(after) and before >= 0 and after >= 0):
        raise ValueError(f"{source}: {before} and {after} are not valid errors")
    stem = source.removesuffix(".weight")
    layer = re.match(r"model\.layers\.(\d{1,6})\.", stem)
    return CalibrationEffect(source, int(layer[1]) if layer else None, stem.rpartition(".")[2], before, after)


def _short(error: Exception) -> str:
    """The error on one short line."""
    what = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return printable(" ".join(what.split()), 80)

"""What a file says of its calibration: the record in its metadata, and the errors in the report beside it.

Both may come from a stranger: what is not as it should be is told in a line and otherwise taken as not there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolexport.calibration.texts import Source
from smolexport.model import CALIBRATION_KEY
from smolexport.regular import open_regular
from smolexport.text import printable

__all__ = ["Record", "Step", "read_record", "read_steps"]

LARGEST = 1 << 26  # bytes of a report that are read
LONGEST_METHOD = 40  # characters: it heads a column of tables


@dataclass(frozen=True)
class Record:
    """How a file was calibrated.

    Attributes:
        method: `imatrix`, `gptq`, `distil`.
        sources: the calibration texts.
        tokens: in all of their windows.
        windows_sha256: of the windows' token ids.
    """

    method: str
    sources: tuple[Source, ...] = field(default=(), repr=False)
    tokens: int = 0
    windows_sha256: str = field(default="", repr=False)


@dataclass(frozen=True)
class Step:
    """A matrix's squared error of its outputs over the outputs: rounded to the nearest, same scales, and as it is.

    `kind` is the last part of the matrix's name, e.g. `q_proj`; `layer` is None outside of the layers.
    """

    source: str
    layer: int | None
    kind: str
    before: float
    after: float


def read_record(metadata: Mapping[str, Any]) -> tuple[Record | None, str]:
    """The record in a file's metadata, None without one that can be read; and a note, empty where all is well."""
    if CALIBRATION_KEY not in metadata:
        return None, ""
    try:
        found = json.loads(str(metadata[CALIBRATION_KEY]))
        method, texts = found["method"], found.get("texts", [])
        if not isinstance(method, str) or not 0 < len(method) <= LONGEST_METHOD:
            raise ValueError("method is no name")
        sources = tuple(Source(str(one["name"]), str(one["sha256"]), int(one["tokens"])) for one in texts)
        return Record(method, sources, int(found.get("tokens", 0)), str(found.get("windows_sha256", ""))), ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return None, f"metadata {CALIBRATION_KEY} cannot be read ({_short(error)}): taken as not calibrated"


def read_steps(path: Path, record: Record) -> tuple[tuple[Step, ...], str]:
    """The errors in the report beside `path`, none where there is none; and a note, empty where all is well."""
    from smolexport.recipe import sidecar_of

    place = sidecar_of(path)
    try:
        if not place.exists():
            return (), ""
        if not place.is_file():  # reading a pipe would wait for ever
            raise ValueError("it is no regular file")
        if place.stat().st_size > LARGEST:
            raise ValueError("it is too large to be one")
        with open_regular(place) as file:
            found = json.loads(file.read())
        if (found["method"], found["windows_sha256"]) != (record.method, record.windows_sha256):
            raise ValueError("it is another file's")
        return tuple(_step(str(source), one) for source, one in found["tensors"].items()), ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return (), f"{place.name}: cannot be read ({_short(error)}): no errors before and after calibration"


def _step(source: str, one: Mapping[str, Any]) -> Step:
    before, after = float(one["before"]), float(one["after"])
    if not (math.isfinite(before) and math.isfinite(after) and before >= 0 and after >= 0):
        raise ValueError(f"{source}: {before} and {after} are no errors")
    stem = source.removesuffix(".weight")
    layer = re.match(r"model\.layers\.(\d{1,6})\.", stem)
    return Step(source, int(layer[1]) if layer else None, stem.rpartition(".")[2], before, after)


def _short(error: Exception) -> str:
    """What is wrong, on one short line."""
    what = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return printable(" ".join(what.split()), 80)

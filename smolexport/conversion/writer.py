"""Where encoded rows land: every array of an output has a place, so rows may arrive in any order."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import OutputError

HELD = 8 << 20  # bytes of rows that wait for being written upright: runs of thousands of bytes instead of hundreds
SLAB = 64  # columns that are turned at a time


@dataclass(frozen=True)
class ByteRange:
    """Rows of `width` bytes, one after another from byte `offset` of file number `file` on.

    They are the bytes [first, first + width) of a tensor's encoded rows: formats that keep codes and scales apart
    have a place for each part.

    With a `pitch` the rows stand upright, each a column of single bytes: byte j of row i is at offset + j * pitch + i.
    """

    offset: int
    width: int
    first: int = 0
    file: int = 0
    pitch: int | None = None


@dataclass
class Held:
    """Rows [start, stop) of a place, in pieces."""

    start: int
    stop: int
    pieces: list[NDArray[np.uint8]] = field(default_factory=list)


class Sink:
    """An output that is being written.

    Attributes:
        paths: the files that will stand there when the output is complete, those that take rows first.
    """

    def __init__(
        self, paths: Sequence[Path], files: Sequence[BinaryIO], places: Mapping[str, Sequence[ByteRange]]
    ) -> None:
        """`places` maps the name of each planned entry to its arrays in `files`."""
        self.paths = list(paths)
        self._files = files
        self._places = places
        self._held: dict[ByteRange, Held] = {}

    def put(self, name: str, start: int, rows: NDArray[np.uint8]) -> None:
        """Write the encoded rows [n, row_bytes] of the entry `name` from row `start` on, some of them at `flush` only.

        Raises:
            OutputError: the disk is full or does not answer.
        """
        for place in self._places[name]:
            part = rows[:, place.first : place.first + place.width]
            if place.pitch is None:
                self._write(place, place.offset + start * place.width, part)
            else:
                self._hold(place, start, part)

    def _hold(self, place: ByteRange, start: int, part: NDArray[np.uint8]) -> None:
        """Keep rows that stand upright until there are many, since a chunk of them is a few bytes here and there."""
        if place in self._held and self._held[place].stop != start:
            self._settle()
        held = self._held.setdefault(place, Held(start, start))
        held.pieces.append(part)
        held.stop += len(part)
        if sum((held.stop - held.start) * place.width for place, held in self._held.items()) >= HELD:
            self._settle()

    def _settle(self) -> None:
        """Write the rows that wait, one run of bytes for each of their columns."""
        for place, held in self._held.items():
            for first in range(0, place.width, SLAB):
                rows = np.concatenate([piece[:, first : first + SLAB] for piece in held.pieces])
                for column, run in enumerate(np.ascontiguousarray(rows.T), first):
                    self._write(place, place.offset + column * (place.pitch or 0) + held.start, run)
        self._held.clear()

    def _write(self, place: ByteRange, offset: int, data: NDArray[np.uint8]) -> None:
        file = self._files[place.file]
        try:
            file.seek(offset)
            file.write(np.ascontiguousarray(data).reshape(-1).data)
        except OSError as error:
            path = self.paths[place.file]
            raise OutputError(f"{path}: {error.strerror or error}; nothing was written") from error

    def flush(self) -> None:
        """Bring everything to the disk, so that nothing can fail but the renaming.

        Raises:
            OutputError: the disk is full or does not answer.
        """
        self._settle()
        for path, file in zip(self.paths, self._files, strict=False):
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise OutputError(f"{path}: {error.strerror or error}; nothing was written") from error

"""Where encoded rows land: every array of an output has a place, so rows may arrive in any order."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import OutputError

__all__ = ["Place", "Sink"]


@dataclass(frozen=True)
class Place:
    """Rows of `width` bytes, one after another from byte `offset` of file number `file` on.

    They are the bytes [first, first + width) of a tensor's encoded rows: formats that keep codes and scales apart
    have a place for each part.
    """

    offset: int
    width: int
    first: int = 0
    file: int = 0


class Sink:
    """An output that is being written.

    Attributes:
        paths: the files that will stand there when the output is complete, those that take rows first.
    """

    def __init__(self, paths: Sequence[Path], files: Sequence[BinaryIO], places: Mapping[str, Sequence[Place]]) -> None:
        """`places` maps the name of each planned entry to its arrays in `files`."""
        self.paths = list(paths)
        self._files = files
        self._places = places

    def put(self, name: str, start: int, rows: NDArray[np.uint8]) -> None:
        """Write the encoded rows [n, row_bytes] of the entry `name` from row `start` on.

        Raises:
            OutputError: the disk is full or does not answer.
        """
        for place in self._places[name]:
            file = self._files[place.file]
            part = rows[:, place.first : place.first + place.width]
            try:
                file.seek(place.offset + start * place.width)
                file.write(np.ascontiguousarray(part).reshape(-1).data)
            except OSError as error:
                path = self.paths[place.file]
                raise OutputError(f"{path}: {error.strerror or error}; nothing was written") from error

    def flush(self) -> None:
        """Bring everything to the disk, so that nothing can fail but the renaming.

        Raises:
            OutputError: the disk is full or does not answer.
        """
        for path, file in zip(self.paths, self._files, strict=False):
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise OutputError(f"{path}: {error.strerror or error}; nothing was written") from error

"""Writes the files of a plan: each part of every entry has a byte range, so rows may arrive in any order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from smolexport.conversion.plan import ByteRange, OutputFile, Plan
from smolexport.errors import OutputError
from smolexport.files import atomic_file, atomic_folder

BUFFERED = 8 << 20  # bytes of rows that wait to be transposed: runs of thousands of bytes instead of hundreds
COLUMNS_AT_ONCE = 64  # transposed at a time


@contextmanager
def open_output(
    plan: Plan, path: Path, *, force: bool = False, replaceable: Callable[[Path], bool] | None = None
) -> Iterator[Sink]:
    """Open `path`, a checked target, for the rows of the plan's entries.

    The output appears whole when the block ends, or not at all.  `force` replaces an earlier output, which for a
    folder is what `replaceable` accepts; None = the output is one file.

    Raises:
        OutputError: it cannot be written.
        CheckpointError: a file to copy has vanished.
    """
    with ExitStack() as stack:
        if replaceable is None:
            [file] = plan.files
            yield Sink([path], [_begun(file, stack.enter_context(atomic_file(path, force=force)))], plan.files)
            return
        folder = stack.enter_context(atomic_folder(path, replaceable=replaceable if force else None))
        opened = []
        for file in plan.files:
            target = folder / file.name
            target.parent.mkdir(exist_ok=True)
            if file.ranges:
                opened.append(_begun(file, stack.enter_context(target.open("wb"))))
            else:
                target.write_bytes(file.read())
        yield Sink([path / file.name for file in plan.files], opened, plan.files)


def _begun(file: OutputFile, opened: BinaryIO) -> BinaryIO:
    opened.write(file.read())
    opened.truncate(file.nbytes)  # padding reads as zeros
    for offset, chunks in file.tables:
        opened.seek(offset)
        for chunk in chunks():
            opened.write(chunk.data)
    return opened


@dataclass
class Pending:
    """Rows [start, stop) of a transposed range, in pieces."""

    start: int
    stop: int
    pieces: list[NDArray[np.uint8]] = field(default_factory=list)


class Sink:
    """An output that is being written; `paths` are the files of the complete output, those with encoded rows first."""

    def __init__(self, paths: Sequence[Path], opened: Sequence[BinaryIO], files: Sequence[OutputFile]) -> None:
        """`opened` are the first of `files`, at the first of `paths`."""
        self.paths = list(paths)
        self._opened = opened
        self._ranges: dict[str, list[tuple[int, ByteRange]]] = {}
        for number, file in enumerate(files):
            for part in file.ranges:
                self._ranges.setdefault(part.entry, []).append((number, part))
        self._pending: dict[tuple[int, ByteRange], Pending] = {}

    def put(self, name: str, start: int, rows: NDArray[np.uint8]) -> None:
        """Write the rows [n, row_bytes] of the entry `name` from row `start` on, or buffer them; raises OutputError."""
        for number, part in self._ranges[name]:
            found = rows[:, part.first : part.first + part.width]
            if part.pitch is None:
                self._write(number, part.offset + start * part.width, found)
            else:
                self._buffer(number, part, start, found)

    def _buffer(self, number: int, part: ByteRange, start: int, rows: NDArray[np.uint8]) -> None:
        """Buffer transposed rows; written chunk by chunk they would be many tiny scattered writes."""
        key = number, part
        if key in self._pending and self._pending[key].stop != start:
            self._write_pending()
        pending = self._pending.setdefault(key, Pending(start, start))
        pending.pieces.append(rows)
        pending.stop += len(rows)
        if sum((found.stop - found.start) * part.width for (_, part), found in self._pending.items()) >= BUFFERED:
            self._write_pending()

    def _write_pending(self) -> None:
        """Write the buffered rows, one run of bytes for each of their columns."""
        for (number, part), pending in self._pending.items():
            for first in range(0, part.width, COLUMNS_AT_ONCE):
                rows = np.concatenate([piece[:, first : first + COLUMNS_AT_ONCE] for piece in pending.pieces])
                for column, run in enumerate(np.ascontiguousarray(rows.T), first):
                    self._write(number, part.offset + column * (part.pitch or 0) + pending.start, run)
        self._pending.clear()

    def _write(self, number: int, offset: int, data: NDArray[np.uint8]) -> None:
        try:
            self._opened[number].seek(offset)
            self._opened[number].write(np.ascontiguousarray(data).reshape(-1).data)
        except OSError as error:
            raise OutputError(f"{self.paths[number]}: {error.strerror or error}; nothing was written") from error

    def flush(self) -> None:
        """Flush everything to disk, so that only the renaming can still fail; raises OutputError."""
        self._write_pending()
        for path, file in zip(self.paths, self._opened, strict=False):
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise OutputError(f"{path}: {error.strerror or error}; nothing was written") from error

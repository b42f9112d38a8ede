"""Files of arrays: safetensors, written from front to back and read array by array with positioned reads.

A symmetric matrix is kept as its upper triangle, row after row: [c * (c + 1) / 2] numbers for [c, c].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import CalibrationError
from smolexport.files import atomic_file, open_regular
from smolexport.text import first_line, label, show

NAMES: Mapping[str, str] = {"float32": "F32", "int32": "I32"}
DTYPES: Mapping[str, np.dtype[Any]] = {name: np.dtype(dtype).newbyteorder("<") for dtype, name in NAMES.items()}
AGAIN = "make it again with smolexport calibrate --force"

Shape = tuple[str, tuple[int, ...]]  # dtype of NumPy, shape


@dataclass(frozen=True)
class Arrays:
    """An opened file: places of its arrays.

    Attributes:
        path: the file.
        places: by name, dtype, shape and first byte.
        metadata: texts by name.
    """

    path: Path
    places: Mapping[str, tuple[np.dtype[Any], tuple[int, ...], int]]
    metadata: Mapping[str, str]

    def shape(self, name: str, what: str) -> tuple[int, ...]:
        """Shape of an array; raises CalibrationError that says `what` is missing."""
        if name not in self.places:
            raise CalibrationError(f"{self.path}: has no {name}, so the statistic of {what} is missing; {AGAIN}")
        return self.places[name][1]

    def check(self, name: str, what: str, shape: tuple[int, ...], dtype: str) -> None:
        """Refuse an array that is missing, or not of `shape` and `dtype`; `what` says for whom it is.

        Raises:
            CalibrationError: names the file, the array, and what was found.
        """
        found = self.shape(name, what)
        if found != shape or self.places[name][0] != DTYPES[NAMES[dtype]]:
            raise CalibrationError(
                f"{self.path}: {name} is {self.places[name][0].name} {show(list(found))}, {what} needs {dtype} "
                f"{list(shape)}; it was made for another checkpoint"
            )

    def read(self, name: str, what: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """An array after `check`; raises CalibrationError."""
        self.check(name, what, shape, dtype)
        return self.rows(name, 0, shape[0])

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Entries [start, stop) along the first axis of an array that is there; raises CalibrationError."""
        dtype, shape, offset = self.places[name]
        out = np.empty((stop - start, *shape[1:]), dtype)
        step = out[:1].nbytes if stop > start else 0
        view = memoryview(out.reshape(-1).view(np.uint8).data)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset + start * step)
                filled = 0
                while filled < len(view):
                    count = file.readinto(view[filled:])
                    if not count:
                        raise CalibrationError(f"{self.path}: ends inside {name}; {AGAIN}")
                    filled += count
        except OSError as error:
            raise CalibrationError(f"{self.path}: reading {name}: {error.strerror}") from error
        return out


def open_arrays(path: Path, what: str) -> Arrays:
    """Read the header of `path`, of which `what` says for whom it is.

    Raises:
        CalibrationError: missing, damaged, or with an array of a kind that is never written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as file, safe_open(path, framework="np"):  # which checks lengths, overlaps and gaps
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CalibrationError(f"{path}: not found, so the statistic of {what} is missing; {AGAIN}") from None
    except (SafetensorError, OSError, ValueError, RecursionError, MemoryError) as error:
        raise CalibrationError(
            f"{path}: is damaged ({first_line(error)}), so the statistic of {what} is missing; {AGAIN}"
        ) from error
    metadata = header.pop("__metadata__", None) or {}
    places = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CalibrationError(f"{path}: {label(name)} is {entry['dtype']}, which statistics never are; {AGAIN}")
        start = 8 + length + entry["data_offsets"][0]
        places[name] = (DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return Arrays(path, places, metadata)


@contextmanager
def writing(
    path: Path, shapes: Mapping[str, Shape], metadata: Mapping[str, str]
) -> Iterator[tuple[BinaryIO, Mapping[str, int]]]:
    """A file to be filled with arrays, which replaces `path` when the block ends; yields it and their first bytes.

    Raises:
        OutputError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end, starts = 0, {}
    for name, (dtype, shape) in shapes.items():
        starts[name] = end
        end += int(np.prod(shape, dtype=np.int64)) * 4
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path, force=True) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        yield file, {name: 8 + len(text) + start for name, start in starts.items()}


def write_arrays(
    path: Path,
    shapes: Mapping[str, Shape],
    parts: Iterable[NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays in the order of `shapes`, their numbers in `parts` of any length; raises OutputError."""
    with writing(path, shapes, metadata or {}) as (file, _):
        for part in parts:
            file.write(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).tobytes())


def triangle_size(columns: int) -> int:
    """Numbers in the upper triangle of a matrix [columns, columns]."""
    return columns * (columns + 1) // 2


def triangle_rows(matrix: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """The upper triangle, row by row."""
    for i in range(len(matrix)):
        yield matrix[i, i:]


def unpack_triangle(
    packed: Sequence[NDArray[np.float32]] | Iterable[NDArray[np.float32]], columns: int
) -> NDArray[np.float32]:
    """The symmetric matrix of which `packed` brings the upper triangle, in parts of any length."""
    full = np.empty((columns, columns), np.float32)
    row, have = 0, 0  # numbers of the present row that are there
    for part in packed:
        taken = 0
        while taken < len(part):
            count = min(len(part) - taken, columns - row - have)
            full[row, row + have : row + have + count] = part[taken : taken + count]
            taken, have = taken + count, have + count
            if have == columns - row:
                row, have = row + 1, 0
    tile = 512  # mirrored in tiles: columns are far apart in memory
    for i in range(0, columns, tile):
        for j in range(i, columns, tile):
            block = full[i : i + tile, j : j + tile]
            if i == j:
                block[np.tril_indices(len(block), -1)] = block.T[np.tril_indices(len(block), -1)]
            else:
                full[j : j + tile, i : i + tile] = block.T
    return full

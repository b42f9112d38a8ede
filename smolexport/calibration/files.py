"""Files of arrays: safetensors, written from front to back and read array by array with positioned reads.

A symmetric matrix is kept as its upper triangle, row after row: [c * (c + 1) / 2] numbers for [c, c].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import CalibrationError
from smolexport.files import atomic_file, open_regular
from smolexport.model.tensor_file import read_header
from smolexport.text import first_line, label, show

NAMES: Mapping[str, str] = {"float32": "F32", "int32": "I32"}
DTYPES: Mapping[str, np.dtype[Any]] = {name: np.dtype(dtype).newbyteorder("<") for dtype, name in NAMES.items()}
AGAIN = "make it again with smolexport calibrate --force"
STRIP = 512  # rows of a triangle read at a time

Shape = tuple[str, tuple[int, ...]]  # dtype of NumPy, shape


@dataclass(frozen=True)
class Arrays:
    """An opened file.

    Attributes:
        path: the file.
        places: dtype, shape and first byte of each array, by name.
        metadata: texts by name.
    """

    path: Path
    places: Mapping[str, tuple[np.dtype[Any], tuple[int, ...], int]]
    metadata: Mapping[str, str]

    def check(self, name: str, what: str, shape: tuple[int, ...], dtype: str) -> None:
        """Raise CalibrationError if an array is missing, or not of `shape` and `dtype`, which `what` needs."""
        if name not in self.places:
            raise CalibrationError(f"{self.path}: has no {name}, so the statistic of {what} is missing; {AGAIN}")
        found, found_shape, _ = self.places[name]
        if found_shape != shape or found != DTYPES[NAMES[dtype]]:
            raise CalibrationError(
                f"{self.path}: {name} is {found.name} {show(list(found_shape))}, {what} needs {dtype} {list(shape)}; "
                "it was made for another checkpoint"
            )

    def read(self, name: str, what: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """A whole array after `check`."""
        self.check(name, what, shape, dtype)
        return self.rows(name, 0, shape[0])

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Entries [start, stop) along the first axis of an array that exists; raises CalibrationError."""
        dtype, shape, offset = self.places[name]
        step = int(np.prod(shape[1:], dtype=np.int64))
        try:
            found = np.fromfile(self.path, dtype, (stop - start) * step, offset=offset + start * step * dtype.itemsize)
        except OSError as error:
            raise CalibrationError(f"{self.path}: reading {name}: {error.strerror}") from error
        if found.size < (stop - start) * step:
            raise CalibrationError(f"{self.path}: ends inside {name}; {AGAIN}")
        return found.reshape(stop - start, *shape[1:])

    def symmetric(self, name: str, columns: int) -> NDArray[np.float32]:
        """The symmetric matrix [columns, columns] whose upper triangle is the array `name`."""
        full, at = np.empty((columns, columns), np.float32), 0
        for start in range(0, columns, STRIP):
            stop = min(columns, start + STRIP)
            size = triangle_size(columns - start) - triangle_size(columns - stop)
            strip = self.rows(name, at, at + size)
            for i in range(start, stop):
                full[i, i:], strip = strip[: columns - i], strip[columns - i :]
            full[stop:, start:stop] = full[start:stop, stop:].T
            corner, lower = full[start:stop, start:stop], np.tril_indices(stop - start, -1)
            corner[lower] = corner.T[lower]
            at += size
        return full


def open_arrays(path: Path, what: str) -> Arrays:
    """Read the header of `path`, which holds the statistic of `what`.

    Raises:
        CalibrationError: missing, damaged, or with an array of a dtype that is never written.
    """
    from safetensors import SafetensorError

    try:
        with open_regular(path):
            header, data = read_header(path)
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
        places[name] = (DTYPES[entry["dtype"]], tuple(entry["shape"]), data + entry["data_offsets"][0])
    return Arrays(path, places, metadata)


@contextmanager
def writing(
    path: Path, shapes: Mapping[str, Shape], metadata: Mapping[str, str]
) -> Iterator[tuple[BinaryIO, dict[str, int]]]:
    """A new file for arrays, which replaces `path` when the block ends; yields it and the arrays' first bytes.

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
    path: Path, shapes: Mapping[str, Shape], parts: Iterable[NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays in the order of `shapes`; `parts` are their numbers in pieces of any length.  Raises OutputError."""
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

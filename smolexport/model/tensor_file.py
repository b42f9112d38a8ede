"""Tensors in a safetensors file: the location of each, and its rows.

Rows are read with positioned reads into small buffers, never mapped: mapped pages count as resident memory, and an
export must stay small whatever the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from smolexport.errors import CheckpointError, TensorError
from smolexport.text import first_line, label

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Buffers in old checkpoints that are computed, not learned.
COMPUTED = (".rotary_emb.inv_freq", ".self_attn.masked_bias", ".self_attn.bias")


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor.

    Attributes:
        name: in the file.
        path: of the file.
        dtype: of its elements in the file.
        shape: [rows, columns] or [n].
        offset: first byte in the file.
        pitch: of a matrix stored transposed, elements from one column to the next; 0 = stored as rows.
        added: constant added to every element.
    """

    name: str
    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    pitch: int = 0
    added: float = 0.0

    def part(self, first: int, shape: tuple[int, ...], *, transposed: bool, added: float) -> StoredTensor:
        """The part of `shape` from row (of a vector: element) `first` on.

        `transposed`: the stored rows are the part's columns, and `first` counts columns of this tensor.
        """
        turned = transposed and len(shape) > 1
        step = 1 if turned else prod(shape[1:])
        place = self.offset + first * step * self.dtype.itemsize
        return replace(self, shape=shape, offset=place, pitch=self.shape[-1] if turned else 0, added=added)

    def read_rows(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) as [rows, columns] in the stored dtype, with a constant in float32; a vector is one row.

        Raises:
            CheckpointError: the file has vanished, or became shorter or unreadable.
        """
        rows, columns = prod(self.shape[:-1]), self.shape[-1]
        stop = rows if stop is None else stop
        # Contiguous runs of elements in the file: all of them, or those of each column.
        shape, step, skip = (1, (stop - start) * columns), 0, start * columns
        if self.pitch:
            shape, step, skip = (columns, stop - start), self.pitch, start
        out = np.empty(shape, self.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                for number, run in enumerate(out.view(np.uint8)):
                    file.seek(self.offset + (skip + number * step) * self.dtype.itemsize)
                    self._fill(file, memoryview(run.data))
        except OSError as error:
            raise CheckpointError(f"{self.path}: reading the tensor {label(self.name)}: {error.strerror}") from error
        found = np.ascontiguousarray(out.T) if self.pitch else out.reshape(stop - start, columns)
        return found.astype(np.float32) + np.float32(self.added) if self.added else found

    def _fill(self, file: FileIO, view: memoryview) -> None:
        filled = 0
        while filled < len(view):
            count = file.readinto(view[filled:])
            if not count:
                raise CheckpointError(f"{self.path}: ends inside the tensor {label(self.name)}")
            filled += count


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the offset of the first byte of data.

    Raises:
        SafetensorError: the file is damaged: lengths, overlaps, gaps or sizes do not fit.
        OSError: it cannot be read.
    """
    from safetensors import safe_open

    with safe_open(path, framework="np"):  # checks the header
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def stored_tensors(path: Path, method: str | None) -> Iterator[StoredTensor]:
    """The tensors of a safetensors file, without computed buffers; no data is read.

    `method`: quantization that config.json claims, for the message.

    Raises:
        CheckpointError: the file is damaged.
        TensorError: a tensor of another dtype than `DTYPES`.
    """
    from safetensors import SafetensorError

    try:
        header, data = read_header(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged or not a safetensors file ({first_line(error)})") from error
    for name, entry in header.items():
        if name == "__metadata__" or name.endswith(COMPUTED):
            continue
        if entry["dtype"] not in DTYPES:
            how = f": the weights are quantized already ({method}); take the original" if method else ""
            raise TensorError(
                f"{path}: tensor {label(name)} has dtype {entry['dtype']}; "
                f"only {', '.join(DTYPES)} weights are exported{how}"
            )
        offset = data + entry["data_offsets"][0]
        yield StoredTensor(name, path, DTYPES[entry["dtype"]], tuple(entry["shape"]), offset)

"""Tensors in a safetensors file: where each is, and its rows.

Rows are read with positioned reads into small buffers, never mapped: mapped pages count as resident memory, and an
export must stay small whatever the model.  safetensors itself checks a file's header (lengths, overlaps, gaps, sizes).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from smolexport.errors import CheckpointError, TensorError
from smolexport.text import first_line, label

__all__ = ["DTYPES", "StoredTensor", "stored_tensors"]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Buffers that old checkpoints carry and that are computed, not learned.
COMPUTED = (".rotary_emb.inv_freq", ".self_attn.masked_bias", ".self_attn.bias")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, dtype, shape, first byte in the file."""

    name: str
    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def read_rows(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) as [rows, columns] in the stored dtype; a vector is one row.

        Raises:
            CheckpointError: the file vanished, became shorter or unreadable since it was opened.
        """
        rows, columns = self.shape if len(self.shape) == 2 else (1, self.shape[0])
        stop = rows if stop is None else stop
        out = np.empty((stop - start, columns), self.dtype)
        try:
            self._fill(memoryview(out.view(np.uint8).reshape(-1).data), start * columns * self.dtype.itemsize)
        except OSError as error:
            raise CheckpointError(f"{self.path}: reading the tensor {label(self.name)}: {error.strerror}") from error
        return out

    def _fill(self, view: memoryview, skip: int) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + skip)
            filled = 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise CheckpointError(f"{self.path}: ends inside the tensor {label(self.name)}")
                filled += count


def stored_tensors(path: Path, method: str | None) -> Iterator[StoredTensor]:
    """The tensors of a safetensors file, without buffers that are computed; no data is read.

    Args:
        path: the file.
        method: how config.json says that the weights are quantized, for the refusal; None = it does not.

    Raises:
        CheckpointError: the file is damaged.
        TensorError: a tensor of another dtype than `DTYPES`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged or not a safetensors file ({first_line(error)})") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name == "__metadata__" or name.endswith(COMPUTED):
            continue
        if entry["dtype"] not in DTYPES:
            how = f": the weights are quantized already ({method}); take the original" if method else ""
            raise TensorError(
                f"{path}: tensor {label(name)} has dtype {entry['dtype']}; "
                f"only {', '.join(DTYPES)} weights are exported{how}"
            )
        yield StoredTensor(
            name, path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )

"""Damaging safetensors files on purpose: their parts, taken apart and put together wrongly."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["join", "poke", "split"]

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: object, data: bytes, length: int | None = None) -> None:
    """Write header (an object, or bytes as they are) and data; `length` replaces the header's true length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def poke(path: Path, name: str, place: tuple[int, ...], value: float) -> None:
    """Overwrite one weight in its file."""
    header, _ = split(path)
    entry = header[name]
    dtype = DTYPES[entry["dtype"]]
    start = 8 + struct.unpack("<Q", path.open("rb").read(8))[0] + entry["data_offsets"][0]
    index = int(np.ravel_multi_index(place, entry["shape"]))
    with path.open("r+b") as file:
        file.seek(start + index * dtype.itemsize)
        file.write(np.array(value, np.float64).astype(dtype).tobytes())

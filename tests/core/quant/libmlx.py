"""MLX's own codecs on the CPU, as the oracle for ours."""

from __future__ import annotations

import hashlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.quant import Part

DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def library() -> Any:
    """mlx.core, or the test is skipped."""
    return pytest.importorskip("mlx.core", reason="no mlx installed: bytes are compared with stored hashes only")


def quantize(weights: NDArray[Any], **options: Any) -> NDArray[np.uint8]:
    """[n, row_bytes]: the arrays that mx.quantize returns, one after another in each row."""
    mx = library()
    brain = weights.dtype == ml_dtypes.bfloat16
    array = mx.array(weights.view(np.uint16)).view(mx.bfloat16) if brain else mx.array(weights)
    arrays = mx.quantize(array, stream=mx.cpu, **options)
    return np.concatenate([np.array(mx.view(a, mx.uint8, stream=mx.cpu)) for a in arrays], axis=1)


def dequantize(data: NDArray[np.uint8], parts: tuple[Part, ...], **options: Any) -> NDArray[np.float32]:
    """mx.dequantize in float32 of the rows that `quantize` made."""
    mx = library()
    kinds = {"U32": mx.uint32, "U8": mx.uint8, "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    arrays = [mx.array(piece).view(kinds[part.dtype]) for piece, part in zip(split(data, parts), parts, strict=True)]
    wide = [
        a.astype(mx.float32) if part.suffix != "weight" and part.dtype != "U8" else a
        for a, part in zip(arrays, parts, strict=True)
    ]
    return np.array(mx.dequantize(*wide, dtype=mx.float32, stream=mx.cpu, **options))


def split(data: NDArray[np.uint8], parts: tuple[Part, ...]) -> list[NDArray[np.uint8]]:
    """The bytes of each part, [n, its bytes]."""
    ends = np.cumsum([part.nbytes for part in parts])[:-1]
    return [np.ascontiguousarray(piece) for piece in np.split(data, ends, axis=1)]


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.shape == b.shape and bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


def fixed_rows(count: int, columns: int) -> NDArray[np.float32]:
    """Values that depend on no library's random numbers: heavy tails, some groups negative, one zero."""
    n = np.arange(count * columns, dtype=np.uint64)
    mixed = (n * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)) >> np.uint64(33)
    unit = (mixed % np.uint64(65521)).astype(np.float32) / np.float32(65521) * 2 - 1
    rows = (unit * unit * unit * np.float32(0.125)).reshape(count, columns)
    rows[1] = -np.abs(rows[1])
    rows[2, : columns // 2] = 0
    return rows


def digest(data: NDArray[np.uint8]) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()[:16]

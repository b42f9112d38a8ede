"""The C quantizer inside llama-cpp-python, called directly: the oracle of these tests and of the benchmark."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant import BlockFormat

LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")


def why_missing() -> str | None:
    """Reason to skip, None if the library is there."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return "llama-cpp-python is not installed"
    if not (Path(spec.origin).parent / "lib" / LIBRARY).is_file():
        return f"llama-cpp-python without {LIBRARY}"
    return None


@cache
def library() -> ctypes.CDLL:
    # Found without importing llama_cpp, which would start the whole of llama.cpp.
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    lib = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / LIBRARY))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return lib


def quantize(form: BlockFormat, rows: NDArray[Any], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    rows = np.ascontiguousarray(rows, np.float32)
    count, columns = rows.shape
    out = np.zeros((count, form.row_bytes(columns)), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    written = library().ggml_quantize_chunk(
        form.ggml_type, rows.ctypes.data, out.ctypes.data, 0, count, columns, weights
    )
    assert written == out.size
    return out


def dequantize(form: BlockFormat, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
    out = np.empty((len(data), columns), np.float32)
    function = getattr(library(), f"dequantize_row_{form.name.replace('_k', '_K')}")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(data.ctypes.data, out.ctypes.data, out.size)
    return out

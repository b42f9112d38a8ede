"""NumPy's files from elsewhere.

Their header is a piece of Python, and NumPy passes on whatever parsing a damaged one raises: SyntaxError, TypeError,
tokenize.TokenError and more.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

LONGEST = 120  # characters of a reason


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype of the numbers that follow; raises ValueError for all else."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        with warnings.catch_warnings(action="ignore"):  # the parser's, about what looks odd
            version = npy.read_magic(file)
            shape, by_columns, dtype = readers[version](file)
    except Exception as error:
        raise ValueError(" ".join(f"{type(error).__name__}: {error}"[:LONGEST].split())) from error
    if dtype.kind not in "biufc" or min(shape, default=0) < 0:
        raise ValueError(f"{dtype} of shape {shape}"[:LONGEST])
    return shape, by_columns, dtype


def read_array(data: bytes) -> NDArray[Any]:
    """The numbers in a file's bytes; raises ValueError, before memory is taken, for all else."""
    file = io.BytesIO(data)
    shape, by_columns, dtype = read_header(file)
    count, left = math.prod(shape), len(data) - file.tell()
    if count * dtype.itemsize > left:
        raise ValueError(f"{count} numbers promised in {left} bytes")
    flat: NDArray[Any] = np.frombuffer(data, dtype, count, file.tell()) if count else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if by_columns else "C")

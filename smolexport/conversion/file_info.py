"""What an exported file contains, in words that every format shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a file: [out, in] shape, block format, bytes, first byte in the file."""

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    offset: int


@dataclass(frozen=True)
class FileInfo:
    """An exported file or folder.

    Attributes:
        path: the file or folder.
        format: e.g. `gguf`.
        architecture: the format's name of the architecture.
        name: what people call the model.
        scheme: the quantization scheme as recorded in the file.
        bytes: size on disk.
        metadata: key -> value, arrays as they are.
        tensors: in file order.
    """

    path: Path
    format: str
    architecture: str
    name: str
    scheme: str
    bytes: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorRow, ...]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(prod(row.shape) for row in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors, without metadata."""
        return 8 * sum(row.nbytes for row in self.tensors) / self.weights if self.weights else 0.0

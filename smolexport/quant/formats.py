"""How rows of weights are stored, and GGUF's block formats as a table.

This module and `planar` describe formats; NumPy and the kernels are imported when the first array is encoded.

Notation: n = rows, columns = elements of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from smolexport.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}  # bytes, under the names of safetensors


class Part(NamedTuple):
    """One array of an encoded row, where a format keeps codes and scales apart.

    Attributes:
        suffix: its name: `weight`, `scales`, `biases`.
        dtype: safetensors name of its type.
        columns: elements per row.
    """

    suffix: str
    dtype: str
    columns: int

    @property
    def nbytes(self) -> int:
        """Bytes per row."""
        return self.columns * SIZES[self.dtype]


class RowFormat(ABC):
    """How rows of weights are stored: each row by itself, so rows can be encoded, moved and decoded in any order.

    An encoded row is its parts one after another.  Formats that store the same integers and scales in different order
    share a `canonical` format and only repack its rows.
    """

    if TYPE_CHECKING:  # fields of some formats, properties of others

        @property
        def name(self) -> str:
            """The name in plans and messages."""

        @property
        def block(self) -> int:
            """Elements that share a scale; a row is whole blocks."""

    @property
    def canonical(self) -> BlockFormat | None:
        """The format whose encoded rows `repack` takes; None for most."""
        return None

    @abstractmethod
    def _parts(self, columns: int) -> tuple[Part, ...]: ...

    @abstractmethod
    def _encode(self, rows: NDArray[Any], importance: NDArray[np.float32] | None, out: NDArray[np.uint8]) -> None:
        """Encode at least one row; the arguments are checked."""

    @abstractmethod
    def _decode(self, data: NDArray[np.uint8], columns: int, out: NDArray[np.float32]) -> None:
        """Decode at least one row, from flat bytes to flat values."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element."""
        columns = max(self.block, 128)  # whole blocks in every format
        return 8 * self.row_bytes(columns) / columns

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` elements is a whole number of blocks."""
        return columns > 0 and columns % self.block == 0

    def parts(self, columns: int) -> tuple[Part, ...]:
        """The arrays of an encoded row, in their order; raises UsageError unless it `fits`."""
        if not self.fits(columns):
            raise UsageError(f"{self.name}: rows of {columns} elements are not whole blocks of {self.block}")
        return self._parts(columns)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row; raises UsageError unless it `fits`."""
        return sum(part.nbytes for part in self.parts(columns))

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape`, whose last axis is the row; raises UsageError unless it `fits`."""
        if not shape:
            raise UsageError(f"{self.name}: a tensor without axes has no rows")
        return prod(shape[:-1]) * self.row_bytes(shape[-1])

    def encode(
        self, rows: NDArray[Any], importance: NDArray[np.float32] | None = None, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Quantize `rows`.

        Args:
            rows: [n, columns] float32, float16 or bfloat16, C-contiguous and finite, also once rounded to the type of
                the scales.
            importance: [columns] float32, finite and not negative: how much an error in each column matters; None
                stands for the format's own weighting.  Formats that cannot use it check it and ignore it.
            out: [n, row_bytes] uint8, C-contiguous; made if None.

        Returns:
            `out`.

        Raises:
            UsageError: an argument of another type, shape or layout, or an importance that is negative or not finite.
        """
        from smolexport.quant import arrays

        arrays.check_rows(self.name, rows)
        out = arrays.output(self.name, (len(rows), self.row_bytes(rows.shape[1])), out)
        if importance is not None:
            importance = arrays.checked_importance(self.name, importance, rows.shape[1])
        if len(rows):
            self._encode(rows, importance, out)
        return out

    def decode(self, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
        """The values that `data` encodes.

        Args:
            data: [n, row_bytes] uint8, C-contiguous.
            columns: elements per row.

        Returns:
            [n, columns] float32.

        Raises:
            UsageError: `data` of another type, shape or layout.
        """
        from smolexport.quant import arrays

        flat = arrays.encoded(self.name, data, self.row_bytes(columns))
        out = arrays.values((len(data), columns))
        if len(data):
            self._decode(flat, columns, out.reshape(-1))
        return out

    def repack(self, blocks: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:  # noqa: ARG002
        """Encoded rows from those of the canonical format.

        Args:
            blocks: [n, bytes of a row of the canonical format] uint8, C-contiguous.
            columns: elements per row.

        Returns:
            [n, row_bytes] uint8.

        Raises:
            UsageError: a format without a canonical one, or `blocks` of another type, shape or layout.
        """
        raise UsageError(f"{self.name}: repacks no other format")


@dataclass(frozen=True)
class BlockFormat(RowFormat):
    """Rows cut into blocks of consecutive elements; each block is encoded on its own.

    `encode` equals libggml's `ggml_quantize_chunk` on x86-64 byte for byte, `decode` its values to the bit.

    Attributes:
        name: lower-case name, e.g. `q4_k`.
        block: elements per block.
        nbytes: bytes per block.
        ggml_type: number of the type in a GGUF file, version 3.
        home: module of `kernels` with `encode_NAME`, `decode_NAME` and, if `weighted`, `encode_NAME_weighted`.
        weighted: whether an importance changes what `encode` writes.
    """

    name: str
    block: int
    nbytes: int
    ggml_type: int
    home: str = field(repr=False)
    weighted: bool = field(repr=False)

    def _parts(self, columns: int) -> tuple[Part, ...]:
        if self.block == 1:
            return (Part("weight", self.name.upper(), columns),)
        return (Part("weight", "U8", columns // self.block * self.nbytes),)

    def _kernel(self, name: str) -> Any:
        return getattr(import_module(f"smolexport.quant.kernels.{self.home}"), name)

    def _encode(self, rows: NDArray[Any], importance: NDArray[np.float32] | None, out: NDArray[np.uint8]) -> None:
        from smolexport.quant import arrays

        if self.block == 1 and rows.size <= arrays.FEW:
            arrays.cast(rows, self.name.upper(), out)
        elif importance is not None and self.weighted:
            self._kernel(f"encode_{self.name}_weighted")(arrays.source(rows), importance, out.reshape(-1))
        else:
            self._kernel(f"encode_{self.name}")(arrays.source(rows), out.reshape(-1))

    def _decode(self, data: NDArray[np.uint8], columns: int, out: NDArray[np.float32]) -> None:  # noqa: ARG002
        from smolexport.quant import arrays

        if self.block == 1 and out.size <= arrays.FEW:
            out[:] = data.view(arrays.FLOATS[self.name.upper()])
        else:
            self._kernel(f"decode_{self.name}")(data, out)


FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        row[0]: BlockFormat(*row)
        for row in (
            # name   block bytes type  home        weighted
            ("f32", 1, 4, 0, "plain", False),
            ("f16", 1, 2, 1, "plain", False),
            ("bf16", 1, 2, 30, "plain", False),
            ("q8_0", 32, 34, 8, "legacy_quants", False),
            ("q4_0", 32, 18, 2, "legacy_quants", True),
            ("q4_1", 32, 20, 3, "legacy_quants", True),
            ("q5_0", 32, 22, 6, "legacy_quants", True),
            ("q5_1", 32, 24, 7, "legacy_quants", True),
            ("iq4_nl", 32, 18, 20, "iq4", True),
            ("q2_k", 256, 84, 10, "q2_k", True),
            ("q3_k", 256, 110, 11, "q3_k", True),
            ("q4_k", 256, 144, 12, "q4_k_q5_k", True),
            ("q5_k", 256, 176, 13, "q4_k_q5_k", True),
            ("q6_k", 256, 210, 14, "q6_k", True),
        )
    }
)

"""Micro-scaled floats of MLX: 4- or 8-bit elements that share an 8-bit scale.

mode     elements         scale                     group
mxfp4    E2M1, 4 bits     2^e (E8M0)                32
nvfp4    E2M1, 4 bits     E4M3                      16
mxfp8    E4M3, 8 bits     2^e (E8M0)                32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant.affine import DTYPES
from smolexport.quant.formats import Part
from smolexport.quant.planar import PartedFormat

Mode = Literal["mxfp4", "nvfp4", "mxfp8"]
# bits of an element, elements of a group
MODES: Mapping[Mode, tuple[int, int]] = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}


@dataclass(frozen=True)
class MicroFormat(PartedFormat):
    """Groups of small floats with one scale.

    Attributes:
        mode: `mxfp4`, `nvfp4` or `mxfp8`.
        dtype: `F16`, `BF16` or `F32`, the type of the model; weights are rounded to it first, and scales computed in
            it, as in MLX.
    """

    mode: Mode
    dtype: Literal["F16", "BF16", "F32"]

    def __post_init__(self) -> None:
        for what, value, known in (("mode", self.mode, MODES), ("dtype", self.dtype, DTYPES)):
            if value not in known:
                raise UsageError(f"micro-scaled floats: {what} is {value!r}, must be one of {', '.join(known)}")

    @property
    def name(self) -> str:
        """The mode; the type of the model is not in it."""
        return self.mode

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return MODES[self.mode][0]

    @property
    def group(self) -> int:
        """Elements that share a scale."""
        return MODES[self.mode][1]

    @property
    def block(self) -> int:
        """The group."""
        return self.group

    def parts(self, columns: int) -> tuple[Part, ...]:
        """Elements and scales."""
        self.check_fit(columns)
        return Part("weight", "U32", columns * self.bits // 32), Part("scales", "U8", columns // self.group)

    def encode(
        self, rows: NDArray[Any], importance: NDArray[np.float32] | None = None, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Quantize `rows`, byte for byte as `mx.quantize` on a CPU.

        Two kinds of groups are excepted, for which that writes infinities or zeros: those with a scale below 2^-127
        get that one, and elements of nvfp4 beyond 2^21 times their scale the largest value.

        Args:
            rows: [n, columns] float32, float16 or bfloat16, C-contiguous and finite, also once rounded to `dtype`.
            importance: checked, not used.
            out: [n, row_bytes] uint8, C-contiguous; made if None.

        Returns:
            `out`.

        Raises:
            UsageError: an argument of another type, shape or layout, or an importance that is negative or not finite.
        """
        source, _, out = self.source(rows, importance, out)
        if len(rows):
            from smolexport.quant.microscale_kernels import encoder

            encoder(self.bits, self.group)(*source, DTYPES[self.dtype], rows.shape[1], out.reshape(-1))
        return out

    def decode(self, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
        """The values that `data` stands for, equal to the bit to `mx.dequantize` to float32.

        Args:
            data: [n, row_bytes] uint8, C-contiguous.
            columns: elements per row.

        Returns:
            [n, columns] float32.

        Raises:
            UsageError: `data` of another type, shape or layout.
        """
        flat = self.stored(data, self.row_bytes(columns))
        out = np.empty((len(data), columns), np.float32)
        if len(data):
            from smolexport.quant.microscale_kernels import decoder

            decoder(self.bits, self.group)(flat, columns, out.reshape(-1))
        return out

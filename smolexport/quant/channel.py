"""Rows of 8-bit integers with one scale each, as ONNX Runtime's MatMulInteger multiplies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.formats import Part
from smolexport.quant.planar import PartedFormat

MIDDLE = 128  # the zero point: codes are stored as unsigned bytes


@dataclass(frozen=True)
class ChannelFormat(PartedFormat):
    """Codes from 1 to 255 around 128; value = (code - 128) * scale, the largest magnitude of a row 127 steps away.

    The codes and scales of `onnxruntime.quantization` for a symmetric weight with a scale per channel, which it calls
    `per_channel`; the codes 128 higher.
    """

    @property
    def name(self) -> str:
        """`int8-row`."""
        return "int8-row"

    @property
    def block(self) -> int:
        """1: rows of any length."""
        return 1

    def parts(self, columns: int) -> tuple[Part, ...]:
        """Codes, and one scale."""
        self.check_fit(columns)
        return Part("B", "U8", columns), Part("scales", "F32", 1)

    def encode(
        self, rows: NDArray[Any], importance: NDArray[np.float32] | None = None, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Quantize `rows`, each by its own largest magnitude; ties go to even codes.

        Args:
            rows: [n, columns] float32, float16 or bfloat16, C-contiguous and finite.
            importance: [columns] float32, finite and not negative; checked, else of no effect.
            out: [n, row_bytes] uint8, C-contiguous; made if None.

        Returns:
            `out`.

        Raises:
            UsageError: an argument of another type, shape or layout, or an importance that is negative or not finite.
        """
        source, _, out = self.source(rows, importance, out)
        if len(rows):
            from smolexport.quant.channel_kernels import encode_channel

            encode_channel(*source, rows.shape[1], out.reshape(-1))
        return out

    def decode(self, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
        """The values that `data` stands for: (code - 128) * scale in float32.

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
            from smolexport.quant.channel_kernels import decode_channel

            decode_channel(flat, columns, out.reshape(-1))
        return out

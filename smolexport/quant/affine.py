"""Affine groups of MLX, 2 to 8 bits: value = scale * code + bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant.formats import Part
from smolexport.quant.planar import PartedFormat

DTYPES = {"F32": 0, "F16": 1, "BF16": 2}  # storage types, as the kernels know them
BITS, GROUPS, ENCODERS = (2, 3, 4, 5, 6, 8), (32, 64, 128), ("mlx", "recode", "search")


@dataclass(frozen=True)
class AffineFormat(PartedFormat):
    """Affine groups with scales and biases of one float type.

    Attributes:
        bits: 2, 3, 4, 5, 6 or 8 bits a code.
        group: 32, 64 or 128 elements that share a scale and a bias.
        dtype: type of scales and biases, `F16`, `BF16` or `F32`; weights are rounded to it first.
        encoder: how codes are found.  `mlx`: byte for byte as `mx.quantize` on a CPU.  `recode`: the same scales and
            biases, with codes that take their rounding to `dtype` into account.  `search`: scales and biases with the
            least squared error among several, weighted by importance; no group is worse than with `recode`.
    """

    bits: int
    group: int
    dtype: Literal["F16", "BF16", "F32"]
    encoder: Literal["mlx", "recode", "search"] = "mlx"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("bits", self.bits, BITS),
            ("group", self.group, GROUPS),
            ("dtype", self.dtype, DTYPES),
            ("encoder", self.encoder, ENCODERS),
        ):
            if value not in known:
                raise UsageError(f"affine groups: {what} is {value!r}, must be one of {', '.join(map(str, known))}")

    @property
    def name(self) -> str:
        """E.g. `affine4-g64`; type and encoder are not in it."""
        return f"affine{self.bits}-g{self.group}"

    @property
    def block(self) -> int:
        """The group."""
        return self.group

    def parts(self, columns: int) -> tuple[Part, ...]:
        """Codes, scales and biases."""
        self.check_fit(columns)
        scales = columns // self.group
        return (
            Part("weight", "U32", columns * self.bits // 32),
            Part("scales", self.dtype, scales),
            Part("biases", self.dtype, scales),
        )

    def encode(
        self, rows: NDArray[Any], importance: NDArray[np.float32] | None = None, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Quantize `rows`.

        Args:
            rows: [n, columns] float32, float16 or bfloat16, C-contiguous and finite, also once rounded to `dtype`.
            importance: [columns] float32, finite and not negative: how much an error in each column matters.  Only
                `search` uses it, the others check it and go on as without.
            out: [n, row_bytes] uint8, C-contiguous; made if None.

        Returns:
            `out`.

        Raises:
            UsageError: an argument of another type, shape or layout, or an importance that is negative or not finite.
        """
        source, weights, out = self.source(rows, importance, out)
        if not len(rows):
            return out
        dtype, columns, target = DTYPES[self.dtype], rows.shape[1], out.reshape(-1)
        from smolexport.quant.affine_kernels import encoder

        search = self.encoder == "search"
        weights = relative(weights, columns) if search else weights
        encode = encoder(self.bits, search)
        encode(*source, dtype, self.group, columns, self.encoder != "mlx", weights, target)
        return out

    def decode(self, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
        """The values that `data` stands for, equal to the bit to `mx.dequantize` with scales and biases as float32.

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
            from smolexport.quant.affine_kernels import decoder

            decoder(self.bits)(flat, DTYPES[self.dtype], self.group, columns, out.reshape(-1))
        return out


def relative(importance: NDArray[np.float32], columns: int) -> NDArray[np.float32]:
    """Importance [columns] with 1 as its largest, so that sums of it stay finite; ones where there is none."""
    most = importance.max(initial=0)
    weights = importance / most if most > 0 else np.ones(columns, np.float32)
    weights.flags.writeable = False
    return weights

"""Where block formats and planar formats keep their codes and scales: what `affine_view` reads and replaces.

In every format value = d * s * (code - zero) - m * b, where d and m are stored floats, and s, zero and b are integers
of a few bits or constants.

Notation: n = rows; pieces = blocks of a row, of `block` elements that share d and m; groups = groups of a row, of
`group` elements that share s, zero and b.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant.arrays import FLOATS
from smolexport.quant.formats import BlockFormat, RowFormat
from smolexport.quant.planar import AffineFormat, NBits

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Scales(NamedTuple):
    """What decodes codes to values.

    Attributes:
        d: [n, pieces] float32.
        m: [n, pieces] float32, or None in formats whose grid always contains zero.
        s: [n, groups] float32.
        zero: [n, groups] float32.
        b: [n, groups] float32; zeros without m.
    """

    d: Floats
    m: Floats | None
    s: Floats
    zero: Floats
    b: Floats


class Layout(ABC):
    """How encoded rows are read and changed; `rows` are [n, row_bytes], and `columns` the elements of a row.

    Attributes:
        bits: bits of a code.
        group: elements that share a scale of the grid.
        block: elements that share d and m.
        middle: the code for zero, where that is always the same one; else 0.
        dtype: type of d and m: `F16`, `BF16` or `F32`.
    """

    bits: int
    group: int
    block: int
    middle: int
    dtype: str

    @property
    def top(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @abstractmethod
    def codes(self, rows: Bytes, columns: int) -> Bytes:
        """[n, columns]."""

    @abstractmethod
    def put_codes(self, rows: Bytes, columns: int, codes: Bytes) -> None:
        """Replace the codes in `rows`, and no other bit."""

    @abstractmethod
    def scales(self, rows: Bytes, columns: int) -> Scales:
        """Everything in `rows` except the codes."""

    @abstractmethod
    def put_floats(self, rows: Bytes, columns: int, d: Floats, m: Floats | None) -> None:
        """Replace the stored floats in `rows`, rounded to their type."""


def rounded(values: Floats, dtype: str) -> Bytes:
    """[n, k] floats as the [n, bytes] of a storage type; raises UsageError for values out of its range."""
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.ascontiguousarray(values.astype(FLOATS[dtype]))
    if not np.isfinite(stored.astype(np.float32)).all():
        worst = float(np.abs(values).max())
        raise UsageError(f"factors: values up to {worst} in magnitude do not fit {dtype}")
    return stored.view(np.uint8)


class Field(NamedTuple):
    """Bits of codes in the bytes of a block, several codes per byte.

    Attributes:
        at: first byte.
        shape: of the bytes.
        axis: where to insert, in that shape, the axis of the codes in one byte, lowest bits first.
        bits: bits per code here.
        low: number of the lowest of these bits in a code.
    """

    at: int
    shape: tuple[int, ...]
    axis: int
    bits: int
    low: int

    @property
    def shifts(self) -> NDArray[np.uint8]:
        """Right shifts that bring the bits of each code in a byte to the lowest place; they broadcast to the bytes."""
        count = np.arange(0, 8, self.bits, dtype=np.uint8)
        return count.reshape(-1, *(1,) * (len(self.shape) - self.axis))

    def read(self, blocks: Bytes) -> Bytes:
        """[pieces, codes of a block], the bits in place."""
        stored = blocks[:, self.at : self.at + prod(self.shape)].reshape(len(blocks), *self.shape)
        found = (np.expand_dims(stored, self.axis + 1) >> self.shifts) & np.uint8((1 << self.bits) - 1)
        found <<= np.uint8(self.low)
        return found.reshape(len(blocks), prod(self.shape) * 8 // self.bits)

    def write(self, blocks: Bytes, codes: Bytes) -> None:
        """Replace the bytes of the field in `blocks`, [pieces, bytes], with the bits of [pieces, codes of a block]."""
        wide = (*self.shape[: self.axis], 8 // self.bits, *self.shape[self.axis :])
        found = (codes.reshape(-1, *wide) >> np.uint8(self.low)) & np.uint8((1 << self.bits) - 1)
        found <<= self.shifts
        packed = np.bitwise_or.reduce(found, axis=self.axis + 1)
        blocks[:, self.at : self.at + prod(self.shape)] = packed.reshape(len(blocks), prod(self.shape))


SubScales = Callable[[Bytes], tuple[Floats, Floats]]


def four_and_four(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and mins of q2_k."""
    return (blocks[:, :16] & 15).astype(np.float32), (blocks[:, :16] >> 4).astype(np.float32)


def six_bits(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales of q3_k, which are signed; no mins."""
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = (low | high << 4).astype(np.float32) - np.float32(32)
    return scales, np.zeros_like(scales)


def six_and_six(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and mins of q4_k and q5_k."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    mins = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def signed_bytes(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales of q6_k; no mins."""
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return scales, np.zeros_like(scales)


@dataclass
class BlockLayout(Layout):
    """A block format; its floats are float16.

    Attributes:
        block, nbytes: elements and bytes of a block.
        group, middle: see `Layout`.
        d_at, m_at: byte offsets of the floats in a block; m_at None without mins.
        fields: where the bits of codes are.
        sub: reads s and b from [pieces, nbytes]; None where s is 1, and b -1 with mins.
    """

    block: int
    nbytes: int
    group: int
    middle: int
    d_at: int
    m_at: int | None
    fields: tuple[Field, ...]
    sub: SubScales | None = None

    def __post_init__(self) -> None:
        self.bits, self.dtype = sum(field.bits for field in self.fields), "F16"

    def codes(self, rows: Bytes, columns: int) -> Bytes:
        """See `Layout`."""
        blocks = rows.reshape(-1, self.nbytes)
        found: Bytes = np.bitwise_or.reduce([field.read(blocks) for field in self.fields])
        return found.reshape(-1, columns)

    def put_codes(self, rows: Bytes, columns: int, codes: Bytes) -> None:  # noqa: ARG002
        """See `Layout`."""
        for field in self.fields:
            field.write(rows.reshape(-1, self.nbytes), codes.reshape(-1, self.block))

    def scales(self, rows: Bytes, columns: int) -> Scales:
        """See `Layout`."""
        blocks, shape = rows.reshape(-1, self.nbytes), (len(rows), columns // self.group)

        def floats(at: int) -> Floats:
            stored = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)
            return stored.astype(np.float32).reshape(len(rows), columns // self.block)

        if self.sub is None:
            s, b = np.ones(shape, np.float32), np.full(shape, 0 if self.m_at is None else -1, np.float32)
        else:
            s, b = (part.reshape(shape) for part in self.sub(blocks))
        zero, m = np.full(shape, self.middle, np.float32), None if self.m_at is None else floats(self.m_at)
        return Scales(floats(self.d_at), m, s, zero, b)

    def put_floats(self, rows: Bytes, columns: int, d: Floats, m: Floats | None) -> None:  # noqa: ARG002
        """See `Layout`."""
        for at, values in ((self.d_at, d), (self.m_at, m)):
            if at is not None and values is not None:
                rows.reshape(-1, self.nbytes)[:, at : at + 2] = rounded(values.reshape(-1, 1), self.dtype)


class PlanarLayout(Layout):
    """A planar format: a bit stream of codes, scales, and biases or zero points.

    Eight codes take as many bytes as a code has bits, the first code in the lowest bits.
    """

    def __init__(self, form: AffineFormat | NBits) -> None:
        """The layout of `form`."""
        self.form, self.bits, self.group, self.block, self.dtype = form, form.bits, form.group, form.group, form.dtype
        self.middle = 8 if isinstance(form, NBits) and form.symmetric else 0

    def part(self, rows: Bytes, columns: int, index: int) -> Bytes:
        """Bytes of one part, [n, bytes], a view."""
        sizes = [part.nbytes for part in self.form.parts(columns)]
        start = sum(sizes[:index])
        return rows[:, start : start + sizes[index]]

    def padded(self, rows: Bytes, columns: int) -> Bytes:
        """All codes, [n, codes], including those beyond the end of a row."""
        stream = self.part(rows, columns, 0)
        eights = len(rows), stream.shape[1] // self.bits, 8
        words, found = np.zeros(eights, np.uint8), np.empty(eights, np.uint8)
        words[..., : self.bits] = stream.reshape(*eights[:2], self.bits)
        for place in range(8):
            found[..., place] = (words.view("<u8")[..., 0] >> np.uint64(place * self.bits)) & np.uint64(self.top)
        return found.reshape(len(rows), 8 * eights[1])

    def codes(self, rows: Bytes, columns: int) -> Bytes:
        """See `Layout`."""
        return np.ascontiguousarray(self.padded(rows, columns)[:, :columns])

    def put_codes(self, rows: Bytes, columns: int, codes: Bytes) -> None:
        """See `Layout`."""
        every = self.padded(rows, columns)
        every[:, :columns] = codes
        eights = every.reshape(len(rows), every.shape[1] // 8, 8)
        words = np.zeros((*eights.shape[:2], 1), "<u8")
        for place in range(8):
            words[..., 0] |= eights[..., place].astype("<u8") << np.uint64(place * self.bits)
        stream = self.part(rows, columns, 0)
        stream[:] = words.view(np.uint8)[..., : self.bits].reshape(stream.shape)

    def floats(self, rows: Bytes, columns: int, index: int) -> Floats:
        """A part of floats, [n, groups]."""
        return np.ascontiguousarray(self.part(rows, columns, index)).view(FLOATS[self.dtype]).astype(np.float32)

    def scales(self, rows: Bytes, columns: int) -> Scales:
        """See `Layout`."""
        d = self.floats(rows, columns, 1)
        one, none = np.ones_like(d), np.zeros_like(d)
        if isinstance(self.form, AffineFormat):
            return Scales(d, self.floats(rows, columns, 2), one, none, -one)
        if self.form.symmetric:
            return Scales(d, None, one, none + np.float32(self.middle), none)
        packed = self.part(rows, columns, 2)
        points = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(rows), 2 * packed.shape[1])[:, : d.shape[1]]
        return Scales(d, None, one, points.astype(np.float32), none)

    def put_floats(self, rows: Bytes, columns: int, d: Floats, m: Floats | None) -> None:
        """See `Layout`."""
        self.part(rows, columns, 1)[:] = rounded(d, self.dtype)
        if m is not None:
            self.part(rows, columns, 2)[:] = rounded(m, self.dtype)


def nibbles(at: int) -> Field:
    """The lower halves of 16 bytes, then the upper ones."""
    return Field(at, (16,), 0, 4, 0)


PAIRS, NIBBLES, EIGHTHS = ((2, 32), 1), ((4, 32), 1), ((32,), 0)
BLOCKS: Mapping[str, BlockLayout] = MappingProxyType(
    {
        # block, bytes, group, middle, offsets of d and m, fields
        "q4_0": BlockLayout(32, 18, 32, 8, 0, None, (nibbles(2),)),
        "q4_1": BlockLayout(32, 20, 32, 0, 0, 2, (nibbles(4),)),
        "q5_0": BlockLayout(32, 22, 32, 16, 0, None, (nibbles(6), Field(2, (4,), 1, 1, 4))),
        "q5_1": BlockLayout(32, 24, 32, 0, 0, 2, (nibbles(8), Field(4, (4,), 1, 1, 4))),
        "q2_k": BlockLayout(256, 84, 16, 0, 80, 82, (Field(16, *PAIRS, 2, 0),), four_and_four),
        "q3_k": BlockLayout(256, 110, 16, 4, 108, None, (Field(32, *PAIRS, 2, 0), Field(0, *EIGHTHS, 1, 2)), six_bits),
        "q4_k": BlockLayout(256, 144, 32, 0, 0, 2, (Field(16, *NIBBLES, 4, 0),), six_and_six),
        "q5_k": BlockLayout(256, 176, 32, 0, 0, 2, (Field(48, *NIBBLES, 4, 0), Field(16, *EIGHTHS, 1, 4)), six_and_six),
        "q6_k": BlockLayout(
            256, 210, 16, 32, 208, None, (Field(0, (2, 64), 1, 4, 0), Field(128, *PAIRS, 2, 4)), signed_bytes
        ),
    }
)


def layout_of(form: RowFormat) -> Layout | None:
    """The layout of a format; None where it has no grid of less than 8 bits."""
    if isinstance(form, BlockFormat):
        return BLOCKS.get(form.name)
    return PlanarLayout(form) if isinstance(form, (AffineFormat, NBits)) and form.bits < 8 else None

"""Any affine format seen as a grid of values, and rebuilt from other codes or other scales.

A format has a grid if every value that a row can hold is a scale times a code plus an offset, both shared by a group of
elements.  A method that chooses codes works on the grid and need not know the format; a method that trains scales works
on the factors, in which the codes are constants.  Formats of 8 bits are left out: they need neither.

Notation: n = rows, columns = elements of a row; the last group of a row may be shorter than the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant import arrays
from smolexport.quant.bit_layouts import Layout, layout_of
from smolexport.quant.formats import RowFormat


@dataclass(frozen=True)
class Grid:
    """Values that rows can hold: value[r, j] = scales[r, j // group] * code + offsets[r, j // group].

    Equal to what the format decodes except that the product is rounded before the offset is added.

    Attributes:
        scales, offsets: [n, groups] float32.
        group: elements that share them.
        top: largest code; the smallest is 0.
        middle: the code for elements of groups whose scale is zero.
    """

    scales: NDArray[np.float32]
    offsets: NDArray[np.float32]
    group: int
    top: int
    middle: int = 0

    def values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[n, columns] float32 at the `codes`, [n, columns] uint8."""
        columns = codes.shape[1]
        found = spread(self.scales, self.group, columns)
        found *= codes
        found += spread(self.offsets, self.group, columns)
        return found


@dataclass(frozen=True)
class Factors:
    """Rows as products: value[r, j] = d[r, j // block] * a[r, j] - m[r, j // block] * b[r, j].

    Equal to the bit to what the format decodes, as numbers.

    Attributes:
        a: [n, columns] float32, small integers: codes, and scales that are themselves codes.
        d: [n, pieces] float32, as stored.
        b: as a, for the minimum or bias; None where the format stores none.
        m: as d, or None.
        block: elements that share d and m.
    """

    a: NDArray[np.float32]
    d: NDArray[np.float32]
    b: NDArray[np.float32] | None
    m: NDArray[np.float32] | None
    block: int

    def values(self) -> NDArray[np.float32]:
        """[n, columns] float32."""
        columns = self.a.shape[1]
        found = spread(self.d, self.block, columns)
        found *= self.a
        if self.b is not None and self.m is not None:
            found -= spread(self.m, self.block, columns) * self.b
        return found


def has_grid(form: RowFormat) -> bool:
    """Whether rows of `form` have a grid of less than 8 bits."""
    return layout_of(form) is not None


def grid_of(form: RowFormat, rows: NDArray[np.uint8], columns: int) -> Grid:
    """The grid of encoded rows, whatever their codes.

    Args:
        form: a format that `has_grid`.
        rows: [n, row_bytes] uint8, C-contiguous.
        columns: elements per row.

    Raises:
        UsageError: a format without a grid, or `rows` of another type, shape or layout.
    """
    layout = fitting_layout(form, rows, columns)
    d, m, s, zero, b = layout.scales(rows, columns)
    ratio, groups = layout.block // layout.group, s.shape[1]
    scales = spread(d, ratio, groups)
    scales *= s
    offsets = zero * scales
    np.negative(offsets, out=offsets)
    if m is not None:
        offsets -= spread(m, ratio, groups) * b
    return Grid(scales, offsets, layout.group, layout.top, layout.middle)


def codes_of(form: RowFormat, rows: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """The codes of encoded rows, [n, columns] uint8; arguments and errors as for `grid_of`."""
    return fitting_layout(form, rows, columns).codes(rows, columns)


def with_codes(form: RowFormat, rows: NDArray[np.uint8], codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encoded rows with the scales of `rows` and other codes.

    Args:
        form: a format that `has_grid`.
        rows: [n, row_bytes] uint8, C-contiguous; not changed.
        codes: [n, columns] uint8, none above the grid's `top`.

    Returns:
        [n, row_bytes] uint8, a new array; all bits except those of the codes are copied from `rows`.

    Raises:
        UsageError: a format without a grid, or an argument of another type, shape or layout, or codes too large.
    """
    if codes.ndim != 2 or codes.dtype != np.uint8 or len(codes) != len(rows):
        raise UsageError(f"{form.name}: expected uint8 codes [{len(rows)}, columns], found {codes.dtype} {codes.shape}")
    layout = fitting_layout(form, rows, codes.shape[1])
    largest = int(codes.max(initial=0))
    if largest > layout.top:
        raise UsageError(f"{form.name}: codes reach from 0 to {layout.top}, found {largest}")
    made = rows.copy()
    layout.put_codes(made, codes.shape[1], np.ascontiguousarray(codes))
    return made


def factors_of(form: RowFormat, rows: NDArray[np.uint8], columns: int) -> Factors:
    """Encoded rows as products with their stored floats; arguments and errors as for `grid_of`."""
    layout = fitting_layout(form, rows, columns)
    d, m, s, zero, b = layout.scales(rows, columns)
    a = layout.codes(rows, columns).astype(np.float32)
    a -= spread(zero, layout.group, columns)
    a *= spread(s, layout.group, columns)
    return Factors(a, d, None if m is None else spread(b, layout.group, columns), m, layout.block)


def with_factors(
    form: RowFormat, rows: NDArray[np.uint8], columns: int, d: NDArray[np.float32], m: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """Encoded rows with other stored floats and nothing else changed.

    Args:
        form: a format that `has_grid`.
        rows: [n, row_bytes] uint8, C-contiguous; not changed.
        columns: elements per row.
        d: [n, pieces] float32 of any sign, rounded here to the stored type.
        m: as d; None if and only if the factors have none.

    Returns:
        [n, row_bytes] uint8, a new array.

    Raises:
        UsageError: a format without a grid, an argument of another type, shape or layout, or a value that is not
            finite in the stored type.
    """
    layout = fitting_layout(form, rows, columns)
    old = layout.scales(rows, columns)
    for what, new, stored in (("d", d, old.d), ("m", m, old.m)):
        if (new is None) != (stored is None):
            raise UsageError(f"{form.name}: {what} is {'missing' if new is None else 'not stored by this format'}")
        if new is not None and stored is not None and new.shape != stored.shape:
            raise UsageError(f"{form.name}: expected {what} of shape {stored.shape}, found {new.shape}")
    made = rows.copy()
    layout.put_floats(made, columns, d, m)
    return made


def spread(values: NDArray[np.float32], group: int, columns: int) -> NDArray[np.float32]:
    """[n, groups] repeated to [n, columns], a new array."""
    return np.ascontiguousarray(values.repeat(group, axis=1)[:, :columns])


def fitting_layout(form: RowFormat, rows: NDArray[np.uint8], columns: int) -> Layout:
    """The layout of `form`; raises UsageError unless `rows` fit it."""
    layout = layout_of(form)
    if layout is None:
        raise UsageError(f"{form.name}: its values are not a grid of less than 8 bits")
    arrays.encoded(form.name, rows, form.row_bytes(columns))
    return layout

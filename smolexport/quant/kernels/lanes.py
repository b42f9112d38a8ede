"""SIMD vectors as a numba type, with which a kernel does the same arithmetic on WIDTH groups at once.

`Lanes` holds WIDTH float32 values, `Mask` WIDTH truth values; both are LLVM vectors and live in registers.  Arithmetic
is lane by lane, IEEE float32, never re-associated and never fused, so each lane computes what a scalar program would.

    a + b   a - b   a * b   a / b           Lanes
    a < b   a > b   a >= b  a == b          Mask, false where a lane is NaN (`at_least_or_nan` is true there)
    p & q   p | q                           Mask
    load(array, i)   store(array, i, a)     WIDTH consecutive float32 of a one-dimensional array from index i on
    splat(x)   where(p, a, b)   sqrt(a)   magnitude(a)   negative(a)   rint(a)   truncate(a)   rounded(a)
    any_lane(p)   first_lane(p)   bits_set(p)   pick(a, lane)   largest(a)    scalars
    extremes_of_groups(array, i, n)         Lanes: smallest and largest of WIDTH groups of n elements
    largest_of_half(a, half)   splat_halves(x, y)    for groups of WIDTH / 2 elements
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.extending import lower_builtin, register_model
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from smolexport.quant.kernels.jit import ARRAY, Array, instruction, lean_helper

# As many lanes as a block of the small formats has elements.  A vector then takes two registers of 512 bits or four of
# 256, enough independent work to hide the latency of an addition in the sums.
WIDTH = 32
WORD, LONG = ir.IntType(32), ir.IntType(64)
VALUES = ir.VectorType(ir.FloatType(), WIDTH)
WORDS = ir.VectorType(WORD, WIDTH)
BITS = ir.VectorType(ir.IntType(1), WIDTH)
INFINITY = np.float32(np.inf)


class Vector(types.Type):  # type: ignore[misc]
    """numba's side of an LLVM vector."""


lanes = Vector("Lanes")
mask = Vector("Mask")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    """Stored and passed as the LLVM vector itself."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, VALUES if kind == lanes else BITS)


def define_operator(op: Any, operand: Vector, result: Vector, emit: Callable[[Any, Any, Any], Any]) -> None:
    """Make `op` work on two vectors of type `operand`; `emit(builder, a, b)` makes the instruction."""

    class Template(AbstractTemplate):  # type: ignore[misc]
        key = op

        def generic(self, args: Any, _keywords: Any) -> Any:
            return signature(result, operand, operand) if tuple(args) == (operand, operand) else None

    register: Any = infer_global(op)
    register(Template)
    lower_builtin(op, operand, operand)(lambda _context, builder, _signature, args: emit(builder, *args))


define_operator(operator.add, lanes, lanes, lambda builder, a, b: builder.fadd(a, b))
define_operator(operator.sub, lanes, lanes, lambda builder, a, b: builder.fsub(a, b))
define_operator(operator.mul, lanes, lanes, lambda builder, a, b: builder.fmul(a, b))
define_operator(operator.truediv, lanes, lanes, lambda builder, a, b: builder.fdiv(a, b))
define_operator(operator.lt, lanes, mask, lambda builder, a, b: builder.fcmp_ordered("<", a, b))
define_operator(operator.gt, lanes, mask, lambda builder, a, b: builder.fcmp_ordered(">", a, b))
define_operator(operator.ge, lanes, mask, lambda builder, a, b: builder.fcmp_ordered(">=", a, b))
define_operator(operator.eq, lanes, mask, lambda builder, a, b: builder.fcmp_ordered("==", a, b))
define_operator(operator.and_, mask, mask, lambda builder, a, b: builder.and_(a, b))
define_operator(operator.or_, mask, mask, lambda builder, a, b: builder.or_(a, b))


def constant(kind: ir.VectorType, value: float) -> ir.Constant:
    """A vector with `value` in every lane."""
    return ir.Constant(kind, [value] * kind.count)


def vector_at(builder: Any, data: Any, index: Any, kind: Any) -> Any:
    """Pointer to the vector of type `kind` that starts `index` of its elements after `data`."""
    start = builder.gep(builder.bitcast(data, kind.element.as_pointer()), [index])
    return builder.bitcast(start, kind.as_pointer())


def shuffled(builder: Any, first: Any, picks: list[int], second: Any = None) -> Any:
    """The lanes `picks` of one vector or of two in a row."""
    second = ir.Constant(first.type, ir.Undefined) if second is None else second
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(WORD, len(picks)), picks))


def filled(builder: Any, kind: ir.VectorType, value: Any) -> Any:
    """A vector with a scalar of the kernel in every lane."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(WORD, 0))
    return shuffled(builder, one, [0] * WIDTH)


def unary(name: str, builder: Any, a: Any) -> Any:
    """LLVM's function `name` for each lane."""
    kind = ir.FunctionType(VALUES, [VALUES])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}f32"), [a])


@instruction(lanes, ARRAY, types.intp)
def load(builder: Any, data: Any, index: Any) -> Any:
    """Lanes from `array[i : i + WIDTH]`."""
    return builder.load(vector_at(builder, data, index, VALUES), align=4)


@instruction(types.void, ARRAY, types.intp, lanes)
def store(builder: Any, data: Any, index: Any, a: Any) -> None:
    """Write lanes to `array[i : i + WIDTH]`."""
    builder.store(a, vector_at(builder, data, index, VALUES), align=4)


@instruction(lanes, types.float32)
def splat(builder: Any, x: Any) -> Any:
    """Lanes that all hold the float32 `x`."""
    return filled(builder, VALUES, x)


@instruction(lanes, mask, lanes, lanes)
def where(builder: Any, choose: Any, a: Any, b: Any) -> Any:
    """Lanes of a where the mask is set, of b elsewhere."""
    return builder.select(choose, a, b)


@instruction(lanes, lanes)
def sqrt(builder: Any, a: Any) -> Any:
    """Square roots, correctly rounded."""
    return unary("sqrt", builder, a)


@instruction(lanes, lanes)
def magnitude(builder: Any, a: Any) -> Any:
    """Absolute values."""
    return unary("fabs", builder, a)


@instruction(lanes, lanes)
def rint(builder: Any, a: Any) -> Any:
    """Nearest integers of any size, ties to even."""
    return unary("rint", builder, a)


@instruction(lanes, lanes)
def truncate(builder: Any, a: Any) -> Any:
    """Integers towards zero."""
    return unary("trunc", builder, a)


@instruction(lanes, lanes)
def rounded(builder: Any, a: Any) -> Any:
    """Nearest integers, ties away from zero."""
    return unary("round", builder, a)


@instruction(lanes, lanes)
def negative(builder: Any, a: Any) -> Any:
    """Lanes with the sign bit flipped."""
    return builder.fneg(a)


@instruction(mask, lanes, lanes)
def at_least_or_nan(builder: Any, a: Any, b: Any) -> Any:
    """Mask of not (a < b)."""
    return builder.fcmp_unordered(">=", a, b)


@instruction(types.boolean, mask)
def any_lane(builder: Any, p: Any) -> Any:
    """Whether any lane of a mask is set."""
    return builder.icmp_unsigned("!=", builder.bitcast(p, ir.IntType(WIDTH)), ir.Constant(ir.IntType(WIDTH), 0))


@instruction(types.intp, mask)
def first_lane(builder: Any, p: Any) -> Any:
    """Number of the first lane that is set; WIDTH if none is."""
    return builder.zext(builder.cttz(builder.bitcast(p, ir.IntType(WIDTH)), ir.Constant(ir.IntType(1), 0)), LONG)


@instruction(types.intp, mask)
def bits_set(builder: Any, p: Any) -> Any:
    """A mask as an integer, lane i in bit i."""
    return builder.zext(builder.bitcast(p, ir.IntType(WIDTH)), LONG)


@instruction(types.float32, lanes, types.intp)
def pick(builder: Any, a: Any, lane: Any) -> Any:
    """Lane number `lane`, as a float32 scalar."""
    return builder.extract_element(a, builder.trunc(lane, WORD))


def halves(builder: Any, vector: Any) -> list[Any]:
    """The first half of the lanes of a vector and the second."""
    count = vector.type.count // 2
    return [shuffled(builder, vector, list(range(start, start + count))) for start in (0, count)]


def winner(builder: Any, a: Any) -> Any:
    """The largest lane, as a scalar."""
    while a.type.count > 1:
        low, high = halves(builder, a)
        a = builder.select(builder.fcmp_ordered(">", low, high), low, high)
    return builder.extract_element(a, ir.Constant(WORD, 0))


@instruction(types.float32, lanes)
def largest(builder: Any, a: Any) -> Any:
    """The largest lane, as a float32 scalar."""
    return winner(builder, a)


@instruction(types.float32, lanes, types.intp)
def largest_of_half(builder: Any, a: Any, half: Any) -> Any:
    """The largest lane of the first (0) or the second (1) half, as a float32 scalar."""
    return winner(builder, builder.select(builder.icmp_signed("==", half, ir.Constant(LONG, 0)), *halves(builder, a)))


@instruction(lanes, types.float32, types.float32)
def splat_halves(builder: Any, x: Any, y: Any) -> Any:
    """Lanes that hold `x` in the first half and `y` in the second."""
    pair = ir.Constant(VALUES, ir.Undefined)
    for i, value in enumerate((x, y)):
        pair = builder.insert_element(pair, value, ir.Constant(WORD, i))
    return shuffled(builder, pair, [0] * (WIDTH // 2) + [1] * (WIDTH // 2))


def paired(builder: Any, first: Any, second: Any, groups: int, symbol: str) -> Any:
    """The halves of each field of two vectors of `groups` fields, compared: one vector of 2 * `groups` fields."""
    field = WIDTH // groups
    sides = [
        shuffled(builder, first, [b + s + i for b in range(0, 2 * WIDTH, field) for i in range(field // 2)], second)
        for s in (0, field // 2)
    ]
    return builder.select(builder.fcmp_ordered(symbol, *sides), *sides)


@instruction(types.UniTuple(lanes, 2), ARRAY, types.intp, types.intp)
def extremes_of_rows(builder: Any, data: Any, index: Any, stride: Any) -> Any:
    """(smallest, largest) of each `array[i + g * stride : i + g * stride + WIDTH]`, group g in lane g.

    Reducing each row on its own halves a vector again and again and wastes most lanes.  Here two vectors are halved
    into one, so that every instruction works on full vectors and the results end up side by side.
    """

    def reduced(first: int, count: int) -> tuple[Any, Any]:
        if count == 1:
            start = builder.gep(data, [builder.add(index, builder.mul(stride, ir.Constant(LONG, first)))])
            value = builder.load(builder.bitcast(start, VALUES.as_pointer()), align=4)
            return value, value
        half = count // 2
        (low, high), (other_low, other_high) = reduced(first, half), reduced(first + half, half)
        return paired(builder, low, other_low, half, "<"), paired(builder, high, other_high, half, ">")

    return cgutils.pack_array(builder, reduced(0, WIDTH))


@lean_helper
def extremes_of_groups(array: Array, start: int, group: int) -> Any:
    """Lanes (smallest, largest) of WIDTH groups of `group` elements from `array[start]` on; a zero has either sign."""
    low, high = splat(INFINITY), splat(-INFINITY)
    for e in range(start, start + group, WIDTH):
        least, most = extremes_of_rows(array, e, group)
        low, high = where(least < low, least, low), where(most > high, most, high)
    return low, high

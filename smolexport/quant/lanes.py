"""SIMD vectors as a numba type, so that a kernel can say "the same arithmetic on WIDTH groups at once".

`Lanes` holds WIDTH float32 values, `Mask` WIDTH truth values; both are LLVM vectors and live in registers.  Arithmetic
is lane by lane, IEEE float32, never re-associated and never fused, so each lane computes what a scalar program would.

    a + b   a - b   a * b   a / b           Lanes
    a < b   a > b   a >= b  a == b          Mask, false where a lane is NaN (`at_least_or_nan` is true there)
    p & q   p | q                           Mask
    load(array, i)   store(array, i, a)     WIDTH consecutive float32 of a one-dimensional array from index i on
    splat(x)   where(p, a, b)   sqrt(a)   magnitude(a)   negative(a)   largest(a)   smallest(a)
    any_lane(p)   first_lane(p)   bits_set(p)   pick(a, lane)    scalars
    largest_of_half(a, half)   splat_halves(x, y)    for groups of WIDTH / 2 elements
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.extending import lower_builtin, register_model
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from smolexport.quant.jit import instruction

# As many lanes as a block of the small formats has elements.  A vector then takes two registers of 512 bits or four of
# 256, enough independent work to hide the latency of an addition in the sums.
WIDTH = 32
VALUES = ir.VectorType(ir.FloatType(), WIDTH)
WORDS = ir.VectorType(ir.IntType(32), WIDTH)
BITS = ir.VectorType(ir.IntType(1), WIDTH)


Emit = Callable[[Any, Any, Any], Any]  # (builder, a, b) -> instruction


class Vector(types.Type):  # type: ignore[misc]
    """numba's side of an LLVM vector."""


lanes = Vector("Lanes")
mask = Vector("Mask")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    """Stored and passed as the LLVM vector itself."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, VALUES if kind == lanes else BITS)


def define_operator(op: Any, operand: Vector, result: Vector, emit: Emit) -> None:
    """Make `op` work on two vectors of type `operand`."""

    class Template(AbstractTemplate):  # type: ignore[misc]
        key = op

        def generic(self, args: Any, _keywords: Any) -> Any:
            return signature(result, operand, operand) if tuple(args) == (operand, operand) else None

    register: Any = infer_global(op)
    register(Template)
    lower_builtin(op, operand, operand)(lambda _context, builder, _signature, args: emit(builder, *args))


def arithmetic(name: str) -> Emit:
    """Emit the instruction that llvmlite's builder calls `name`."""
    return lambda builder, a, b: getattr(builder, name)(a, b)


def comparison(symbol: str) -> Emit:
    """Emit a comparison that is false for NaN."""
    return lambda builder, a, b: builder.fcmp_ordered(symbol, a, b)


for _op, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    define_operator(_op, lanes, lanes, arithmetic(_name))
for _op, _name in ((operator.lt, "<"), (operator.gt, ">"), (operator.ge, ">="), (operator.eq, "==")):
    define_operator(_op, lanes, mask, comparison(_name))
define_operator(operator.and_, mask, mask, arithmetic("and_"))
define_operator(operator.or_, mask, mask, arithmetic("or_"))


def constant(kind: ir.VectorType, value: float) -> ir.Constant:
    """A vector with `value` in every lane."""
    return ir.Constant(kind, [value] * WIDTH)


def address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Pointer to the vector that starts at `array[index]`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), VALUES.as_pointer())


def unary(builder: Any, name: str, value: Any) -> Any:
    """LLVM's function `name` for each lane."""
    kind = ir.FunctionType(VALUES, [VALUES])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}f32")
    return builder.call(function, [value])


@instruction
def load(_context: Any, array: Any, _index: Any) -> Any:
    """Lanes from `array[i : i + WIDTH]`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(address(context, builder, signature.args[0], *args), align=4)

    return lanes(array, types.intp), generate


@instruction
def store(_context: Any, array: Any, _index: Any, _a: Any) -> Any:
    """Write lanes to `array[i : i + WIDTH]`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], address(context, builder, signature.args[0], args[0], args[1]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), generate


@instruction
def splat(_context: Any, _x: Any) -> Any:
    """Lanes that all hold the float32 `x`."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        one = builder.insert_element(ir.Constant(VALUES, ir.Undefined), args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one, ir.Constant(VALUES, ir.Undefined), constant(WORDS, 0))

    return lanes(types.float32), generate


@instruction
def where(_context: Any, _choose: Any, _a: Any, _b: Any) -> Any:
    """Lanes of a where the mask is set, of b elsewhere."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return lanes(mask, lanes, lanes), generate


@instruction
def sqrt(_context: Any, _a: Any) -> Any:
    """Square roots, correctly rounded."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return unary(builder, "sqrt", args[0])

    return lanes(lanes), generate


@instruction
def negative(_context: Any, _a: Any) -> Any:
    """Lanes with the sign bit turned."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fneg(*args)

    return lanes(lanes), generate


@instruction
def magnitude(_context: Any, _a: Any) -> Any:
    """Absolute values."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return unary(builder, "fabs", args[0])

    return lanes(lanes), generate


@instruction
def at_least_or_nan(_context: Any, _a: Any, _b: Any) -> Any:
    """Mask of not (a < b)."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fcmp_unordered(">=", *args)

    return mask(lanes, lanes), generate


@instruction
def any_lane(_context: Any, _mask: Any) -> Any:
    """Whether any lane of a mask is set."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = builder.bitcast(args[0], ir.IntType(WIDTH))
        return builder.icmp_unsigned("!=", word, ir.Constant(ir.IntType(WIDTH), 0))

    return types.boolean(mask), generate


def halves(builder: Any, vector: Any, count: int) -> tuple[Any, Any]:
    """The first `count` lanes of a vector and the other `count`."""
    kind, undefined = ir.VectorType(ir.IntType(32), count), ir.Constant(vector.type, ir.Undefined)
    low, high = (ir.Constant(kind, list(range(start, start + count))) for start in (0, count))
    return builder.shuffle_vector(vector, undefined, low), builder.shuffle_vector(vector, undefined, high)


def reduction(comparison: str, value: Any, builder: Any) -> Any:
    """The lane that wins all comparisons, as a scalar."""
    count = value.type.count // 2
    while count:
        low, high = halves(builder, value, count)
        value = builder.select(builder.fcmp_ordered(comparison, low, high), low, high)
        count //= 2
    return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))


@instruction
def largest(_context: Any, _a: Any) -> Any:
    """The largest lane, as a float32 scalar."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return reduction(">", args[0], builder)

    return types.float32(lanes), generate


@instruction
def smallest(_context: Any, _a: Any) -> Any:
    """The smallest lane, as a float32 scalar."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return reduction("<", args[0], builder)

    return types.float32(lanes), generate


@instruction
def first_lane(_context: Any, _mask: Any) -> Any:
    """Number of the first lane that is set, WIDTH without one."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.IntType(WIDTH)
        word = builder.bitcast(args[0], kind)
        count = builder.cttz(word, ir.Constant(ir.IntType(1), 0))
        return builder.zext(count, ir.IntType(64))

    return types.intp(mask), generate


@instruction
def bits_set(_context: Any, _mask: Any) -> Any:
    """A mask as an integer, lane i in bit i."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(WIDTH)), ir.IntType(64))

    return types.intp(mask), generate


@instruction
def pick(_context: Any, _a: Any, _lane: Any) -> Any:
    """Lane number `lane`, as a float32 scalar."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], builder.trunc(args[1], ir.IntType(32)))

    return types.float32(lanes, types.intp), generate


@instruction
def largest_of_half(_context: Any, _a: Any, _half: Any) -> Any:
    """The largest lane of the first (0) or the second (1) half, as a float32 scalar."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        low, high = halves(builder, args[0], WIDTH // 2)
        chosen = builder.select(builder.icmp_signed("==", args[1], ir.Constant(ir.IntType(64), 0)), low, high)
        return reduction(">", chosen, builder)

    return types.float32(lanes, types.intp), generate


@instruction
def splat_halves(_context: Any, _x: Any, _y: Any) -> Any:
    """Lanes that hold `x` in the first half and `y` in the second."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pair = ir.Constant(VALUES, ir.Undefined)
        for place, value in enumerate(args):
            pair = builder.insert_element(pair, value, ir.Constant(ir.IntType(32), place))
        picks = ir.Constant(WORDS, [0] * (WIDTH // 2) + [1] * (WIDTH // 2))
        return builder.shuffle_vector(pair, ir.Constant(VALUES, ir.Undefined), picks)

    return lanes(types.float32, types.float32), generate

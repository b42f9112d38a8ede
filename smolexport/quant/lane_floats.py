"""Small floating-point formats in lanes: bfloat16, float8 E4M3, and exponents alone.

brain_rounded(a)   half_rounded(a)                values rounded to bfloat16 and float16, kept as float32
e4m3_bits(a)   e4m3_value(a)                      to and from the bits of float8 E4M3FN, as integers
exponents_up(a)   powers_of_two(a)                exponent e with a <= 2^e, and 2^e
rint(a)                                           nearest integers of any size, ties to even
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from smolexport.quant.jit import helper, instruction
from smolexport.quant.lane_codes import half_bits, half_value, memory
from smolexport.quant.lanes import VALUES, WIDTH, WORDS, constant, lanes, unary

SIZE = 0x7FFFFFFF
BIASES = constant(WORDS, 127)


@helper
def half_rounded(a: Any) -> Any:
    """Lanes rounded to float16, ties to even."""
    return half_value(half_bits(a))


@instruction
def rint(_context: Any, _a: Any) -> Any:
    """Nearest integers, ties to even."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return unary(builder, "rint", args[0])

    return lanes(lanes), generate


def brain_words(builder: Any, value: Any) -> Any:
    """Words whose upper halves are the bits of the bfloat16 nearest to finite lanes, ties to even."""
    bits = builder.bitcast(value, WORDS)
    odd = builder.and_(builder.lshr(bits, constant(WORDS, 16)), constant(WORDS, 1))
    return builder.add(builder.add(bits, constant(WORDS, 0x7FFF)), odd)


@instruction
def brain_rounded(_context: Any, _a: Any) -> Any:
    """Finite lanes rounded to bfloat16, ties to even."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        words = builder.and_(brain_words(builder, args[0]), constant(WORDS, 0xFFFF0000))
        return builder.bitcast(words, VALUES)

    return lanes(lanes), generate


@instruction
def brain_bits(_context: Any, _a: Any) -> Any:
    """Bits of the bfloat16 nearest to finite lanes, ties to even, as integers."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.sitofp(builder.lshr(brain_words(builder, args[0]), constant(WORDS, 16)), VALUES)

    return lanes(lanes), generate


@instruction
def load_brains(_context: Any, array: Any, _index: Any) -> Any:
    """Lanes with the bfloat16 whose bits are the uint16 `array[i : i + WIDTH]`."""
    kind = ir.VectorType(ir.IntType(16), WIDTH)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = builder.load(memory(context, builder, signature.args[0], args[0], args[1], kind), align=1)
        return builder.bitcast(builder.shl(builder.zext(stored, WORDS), constant(WORDS, 16)), VALUES)

    return lanes(array, types.intp), generate


@instruction
def e4m3_bits(_context: Any, _a: Any) -> Any:
    """Bits of the float8 E4M3FN nearest to each lane, ties to even; beyond 448 it saturates."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], WORDS)
        size = builder.and_(bits, constant(WORDS, SIZE))
        # Below 2^-6 adding 2^14, whose unit in the last place is 2^-9, rounds to the grid of the subnormals.
        grid = constant(VALUES, 2.0**14)
        moved = builder.bitcast(builder.fadd(builder.bitcast(size, VALUES), grid), WORDS)
        tiny = builder.sub(moved, builder.bitcast(grid, WORDS))
        odd = builder.and_(builder.lshr(size, constant(WORDS, 20)), constant(WORDS, 1))
        normal = builder.add(builder.add(size, constant(WORDS, 0x7FFFF - (120 << 23) & 0xFFFFFFFF)), odd)
        rounded = builder.lshr(normal, constant(WORDS, 20))
        below = builder.icmp_unsigned("<", size, constant(WORDS, 121 << 23))
        rounded = builder.select(below, tiny, rounded)
        beyond = builder.icmp_unsigned(">=", size, constant(WORDS, 543 << 21))  # 480, the first that is not a number
        rounded = builder.select(beyond, constant(WORDS, 0x7E), rounded)
        sign = builder.and_(builder.lshr(bits, constant(WORDS, 24)), constant(WORDS, 0x80))
        return builder.sitofp(builder.or_(rounded, sign), VALUES)

    return lanes(lanes), generate


@instruction
def e4m3_value(_context: Any, _a: Any) -> Any:
    """Values of float8 E4M3FN bits that are given as integers; 127 and 255 come out as 480 and -480."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = builder.fptosi(args[0], WORDS)
        size = builder.shl(builder.and_(word, constant(WORDS, 0x7F)), constant(WORDS, 20))
        value = builder.fmul(builder.bitcast(size, VALUES), constant(VALUES, 2.0**120))  # moves the exponent's bias
        sign = builder.shl(builder.and_(word, constant(WORDS, 0x80)), constant(WORDS, 24))
        return builder.bitcast(builder.or_(builder.bitcast(value, WORDS), sign), VALUES)

    return lanes(lanes), generate


@instruction
def exponents_up(_context: Any, _a: Any) -> Any:
    """The smallest integers e from -127 on with a <= 2^e, of positive lanes."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], WORDS)
        # Where the mantissa is not zero this carries into the exponent; 2^-127 has an exponent field of 0.
        exponent = builder.sub(builder.lshr(builder.add(bits, constant(WORDS, 0x7FFFFF)), constant(WORDS, 23)), BIASES)
        lowest = builder.icmp_signed("<=", bits, constant(WORDS, 0x400000))
        return builder.sitofp(builder.select(lowest, constant(WORDS, -127), exponent), VALUES)

    return lanes(lanes), generate


@instruction
def powers_of_two(_context: Any, _a: Any) -> Any:
    """2^e of integers e from -127 to 128; 2^128 is infinity."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        biased = builder.add(builder.fptosi(args[0], WORDS), BIASES)
        lowest = builder.icmp_signed("<=", biased, constant(WORDS, 0))
        bits = builder.select(lowest, constant(WORDS, 0x400000), builder.shl(biased, constant(WORDS, 23)))
        return builder.bitcast(bits, VALUES)

    return lanes(lanes), generate

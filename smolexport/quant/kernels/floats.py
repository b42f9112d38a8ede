"""Small floating-point formats: float16 and bfloat16, one at a time and in lanes; in lanes, E4M3 and exponents too.

The rounding is to nearest even.  That of float16 equals the F16C instructions for everything but the payload of a NaN.

    narrow_f16(x)   widen_f16(bits)   narrow_bf16(x)   widen_bf16(bits)    one number
    half_bits(a)   half_value(a)   half_rounded(a)                         float16 in lanes: bits as integers
    bf16_bits(a)   load_bf16(array, i)   bf16_rounded(a)               bfloat16
    e4m3_bits(a)   e4m3_value(a)                                           float8 E4M3FN
    exponents_up(a)   powers_of_two(a)                                     exponent e with a <= 2^e, and 2^e
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from smolexport.quant.kernels.codes import SHORTS, integers, word_of
from smolexport.quant.kernels.jit import ARRAY, helper, instruction
from smolexport.quant.kernels.lanes import VALUES, WORD, WORDS, constant, lanes, vector_at

FLOAT = VALUES.element
TWO_POW_112 = np.float32(2.0**112)
HALF = np.float32(0.5)
SIZE = 0x7FFFFFFF
BIASES = constant(WORDS, 127)


@instruction(types.uint32, types.float32)
def bits_of(builder: Any, x: Any) -> Any:
    """The uint32 with the bits of the float32 `x`."""
    return builder.bitcast(x, WORD)


@instruction(types.float32, types.uint32)
def float_of(builder: Any, bits: Any) -> Any:
    """The float32 with the bits of the uint32 `bits`."""
    return builder.bitcast(bits, FLOAT)


@helper
def widen_bf16(bits: np.uint16) -> Any:
    """The float32 value of bfloat16 bits."""
    return float_of(np.uint32(np.uint32(bits) << np.uint32(16)))


@helper
def widen_f16(bits: np.uint16) -> Any:
    """The float32 value of float16 bits."""
    wide = np.uint32(bits)
    magnitude = np.uint32((wide & np.uint32(0x7FFF)) << np.uint32(13))
    finite = bits_of(float_of(magnitude) * TWO_POW_112)  # exact: moves the exponent's bias, subnormals included
    special = (wide & np.uint32(0x7C00)) == np.uint32(0x7C00)
    value = np.uint32(magnitude | np.uint32(0x7F800000)) if special else finite
    return float_of(np.uint32(value | ((wide & np.uint32(0x8000)) << np.uint32(16))))


@helper
def narrow_f16(x: np.float32) -> np.uint16:
    """float16 bits nearest to `x`, ties to even; a NaN becomes the plain quiet one with the sign of `x`."""
    bits = bits_of(x)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # Below 2^-14 adding 0.5, whose unit in the last place is 2^-24, rounds to the grid of the subnormals.
    tiny = np.uint32(bits_of(float_of(magnitude) + HALF) - np.uint32(0x3F000000))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
    rounded = tiny if magnitude < np.uint32(0x38800000) else normal
    rounded = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else rounded
    rounded = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else rounded
    return np.uint16(rounded | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


@helper
def narrow_bf16(x: np.float32) -> np.uint16:
    """bfloat16 bits nearest to `x`, ties to even; a NaN is made quiet and keeps its upper bits."""
    bits = bits_of(x)
    top = np.uint32(bits >> np.uint32(16))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + (top & np.uint32(1))) >> np.uint32(16))
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(top | np.uint32(64)) if is_nan else rounded)


def odd_bit(builder: Any, words: Any, place: int) -> Any:
    """Bit `place` of words as 0 or 1: what makes ties go to even."""
    return builder.and_(builder.lshr(words, constant(WORDS, place)), constant(WORDS, 1))


def sign_bit(builder: Any, bits: Any, shift: int) -> Any:
    """The sign of float32 bits, `shift` places lower."""
    return builder.and_(builder.lshr(bits, constant(WORDS, shift)), constant(WORDS, 0x80000000 >> shift))


def moved_sign(builder: Any, word: Any, shift: int) -> Any:
    """The sign of narrow bits, `shift` places higher, as that of a float32."""
    return builder.shl(builder.and_(word, constant(WORDS, 0x80000000 >> shift)), constant(WORDS, shift))


@instruction(lanes, lanes)
def half_bits(builder: Any, a: Any) -> Any:
    """Bits of the float16 nearest to each lane, as integers; the lanes' version of `narrow_f16`."""
    bits = builder.bitcast(a, WORDS)
    size = builder.and_(bits, constant(WORDS, SIZE))
    moved = builder.bitcast(builder.fadd(builder.bitcast(size, VALUES), constant(VALUES, 0.5)), WORDS)
    tiny = builder.sub(moved, constant(WORDS, 0x3F000000))
    normal = builder.add(builder.add(size, constant(WORDS, 0xC8000FFF)), odd_bit(builder, size, 13))
    rounded = builder.lshr(normal, constant(WORDS, 13))
    below = builder.icmp_unsigned("<", size, constant(WORDS, 0x38800000))
    rounded = builder.select(below, tiny, rounded)
    for limit, word in ((0x477FF000, 0x7C00), (0x7F800001, 0x7E00)):
        beyond = builder.icmp_unsigned(">=", size, constant(WORDS, limit))
        rounded = builder.select(beyond, constant(WORDS, word), rounded)
    return integers(builder, builder.or_(rounded, sign_bit(builder, bits, 16)))


@instruction(lanes, lanes)
def half_value(builder: Any, a: Any) -> Any:
    """Values of float16 bits that are given as integers; the lanes' version of `widen_f16`."""
    word = word_of(builder, a)
    size = builder.shl(builder.and_(word, constant(WORDS, 0x7FFF)), constant(WORDS, 13))
    finite = builder.fmul(builder.bitcast(size, VALUES), constant(VALUES, 2.0**112))
    exponent = constant(WORDS, 0x7C00)
    special = builder.icmp_signed("==", builder.and_(word, exponent), exponent)
    infinite = builder.or_(size, constant(WORDS, 0x7F800000))
    bits = builder.select(special, infinite, builder.bitcast(finite, WORDS))
    return builder.bitcast(builder.or_(bits, moved_sign(builder, word, 16)), VALUES)


@helper
def half_rounded(a: Any) -> Any:
    """Lanes rounded to float16, ties to even."""
    return half_value(half_bits(a))


def bf16_words(builder: Any, a: Any) -> Any:
    """Words whose upper halves are the bits of the bfloat16 nearest to finite lanes, ties to even."""
    bits = builder.bitcast(a, WORDS)
    return builder.add(builder.add(bits, constant(WORDS, 0x7FFF)), odd_bit(builder, bits, 16))


@instruction(lanes, lanes)
def bf16_rounded(builder: Any, a: Any) -> Any:
    """Finite lanes rounded to bfloat16, ties to even."""
    return builder.bitcast(builder.and_(bf16_words(builder, a), constant(WORDS, 0xFFFF0000)), VALUES)


@instruction(lanes, lanes)
def bf16_bits(builder: Any, a: Any) -> Any:
    """Bits of the bfloat16 nearest to finite lanes, ties to even, as integers."""
    return integers(builder, builder.lshr(bf16_words(builder, a), constant(WORDS, 16)))


@instruction(lanes, ARRAY, types.intp)
def load_bf16(builder: Any, data: Any, index: Any) -> Any:
    """Lanes with the bfloat16 whose bits are the uint16 `array[i : i + WIDTH]`."""
    stored = builder.zext(builder.load(vector_at(builder, data, index, SHORTS), align=1), WORDS)
    return builder.bitcast(builder.shl(stored, constant(WORDS, 16)), VALUES)


@instruction(lanes, lanes)
def e4m3_bits(builder: Any, a: Any) -> Any:
    """Bits of the float8 E4M3FN nearest to each lane, ties to even; beyond 448 it saturates."""
    bits = builder.bitcast(a, WORDS)
    size = builder.and_(bits, constant(WORDS, SIZE))
    # Below 2^-6 adding 2^14, whose unit in the last place is 2^-9, rounds to the grid of the subnormals.
    grid = constant(VALUES, 2.0**14)
    moved = builder.bitcast(builder.fadd(builder.bitcast(size, VALUES), grid), WORDS)
    tiny = builder.sub(moved, builder.bitcast(grid, WORDS))
    normal = builder.add(size, constant(WORDS, 0x7FFFF - (120 << 23) & 0xFFFFFFFF))
    rounded = builder.lshr(builder.add(normal, odd_bit(builder, size, 20)), constant(WORDS, 20))
    below = builder.icmp_unsigned("<", size, constant(WORDS, 121 << 23))
    rounded = builder.select(below, tiny, rounded)
    beyond = builder.icmp_unsigned(">=", size, constant(WORDS, 543 << 21))  # 480, the first value out of range
    rounded = builder.select(beyond, constant(WORDS, 0x7E), rounded)
    return integers(builder, builder.or_(rounded, sign_bit(builder, bits, 24)))


@instruction(lanes, lanes)
def e4m3_value(builder: Any, a: Any) -> Any:
    """Values of float8 E4M3FN bits that are given as integers; 127 and 255 become 480 and -480."""
    word = word_of(builder, a)
    size = builder.shl(builder.and_(word, constant(WORDS, 0x7F)), constant(WORDS, 20))
    value = builder.fmul(builder.bitcast(size, VALUES), constant(VALUES, 2.0**120))  # moves the exponent's bias
    return builder.bitcast(builder.or_(builder.bitcast(value, WORDS), moved_sign(builder, word, 24)), VALUES)


@instruction(lanes, lanes)
def exponents_up(builder: Any, a: Any) -> Any:
    """The smallest integers e from -127 on with a <= 2^e, of positive lanes."""
    bits = builder.bitcast(a, WORDS)
    # A nonzero mantissa carries into the exponent; 2^-127 is subnormal, with an exponent field of 0.
    exponent = builder.sub(builder.lshr(builder.add(bits, constant(WORDS, 0x7FFFFF)), constant(WORDS, 23)), BIASES)
    lowest = builder.icmp_signed("<=", bits, constant(WORDS, 0x400000))
    return integers(builder, builder.select(lowest, constant(WORDS, -127), exponent))


@instruction(lanes, lanes)
def powers_of_two(builder: Any, a: Any) -> Any:
    """2^e of integers e from -127 to 128; 2^128 is infinity."""
    biased = builder.add(word_of(builder, a), BIASES)
    lowest = builder.icmp_signed("<=", biased, constant(WORDS, 0))
    return builder.bitcast(
        builder.select(lowest, constant(WORDS, 0x400000), builder.shl(biased, constant(WORDS, 23))), VALUES
    )

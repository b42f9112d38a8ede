"""Integers in lanes: rounding, bit fields, and writing them as bytes.

Integer lanes are float32 lanes whose values are whole numbers, exact up to 2^24.

    truncate(a)   nearest(a)   rounded(a)   codes(a, low, high)    rounding
    upper(a, n)   low_bits(a, n)   joined(a, b, n)           bit fields: a >> n, a & 2^n - 1, a | b << n
    half_bits(a)   half_value(a)                             to and from the bits of float16
    store_bytes(array, i, a)   store_nibbles(array, i, a)    to a uint8 array
    store_halves(array, i, a)   load_halves(array, i)        to and from uint16
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from smolexport.quant.jit import instruction
from smolexport.quant.lanes import VALUES, WIDTH, WORDS, constant, halves, lanes, unary

HALF_WORDS = ir.VectorType(ir.IntType(32), WIDTH // 2)

# Adding this moves the integer nearest to a small float32, ties to even, into the low bits of its representation.
MAGIC = 12582912.0
MAGIC_ZERO = 0x400000
MAGIC_FIELD = 0x7FFFFF


def magic_field(builder: Any, value: Any) -> Any:
    """Words with the nearest integer plus MAGIC_ZERO; what is out of range wraps in the reference's way."""
    moved = builder.bitcast(builder.fadd(value, constant(VALUES, MAGIC)), WORDS)
    return builder.and_(moved, constant(WORDS, MAGIC_FIELD))


def clamp(builder: Any, words: Any, low: Any, high: Any) -> Any:
    """Signed minimum and maximum."""
    words = builder.select(builder.icmp_signed("<", words, low), low, words)
    return builder.select(builder.icmp_signed(">", words, high), high, words)


@instruction
def nearest(_context: Any, _a: Any) -> Any:
    """Nearest integers, ties to even, as the reference computes them (beyond 2^22 that is not the nearest one)."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        words = builder.sub(magic_field(builder, args[0]), constant(WORDS, MAGIC_ZERO))
        return builder.sitofp(words, VALUES)

    return lanes(lanes), generate


@instruction
def codes(_context: Any, _a: Any, _low: Any, _high: Any) -> Any:
    """`nearest(a)` limited to low ... high (integers, the same for all lanes)."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        low, high = (splat_word(builder, builder.trunc(bound, ir.IntType(32)), MAGIC_ZERO) for bound in args[1:])
        words = clamp(builder, magic_field(builder, args[0]), low, high)
        return builder.sitofp(builder.sub(words, constant(WORDS, MAGIC_ZERO)), VALUES)

    return lanes(lanes, types.intp, types.intp), generate


def splat_word(builder: Any, word: Any, plus: int) -> Any:
    """A vector that holds `word` + `plus` in all lanes."""
    moved = builder.add(word, ir.Constant(ir.IntType(32), plus))
    one = builder.insert_element(ir.Constant(WORDS, ir.Undefined), moved, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(WORDS, ir.Undefined), constant(WORDS, 0))


@instruction
def low_bits(_context: Any, _a: Any, _bits: Any) -> Any:
    """Integers reduced to their lowest `bits` bits, negative ones in two's complement."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        one = ir.Constant(ir.IntType(32), 1)
        field = splat_word(builder, builder.shl(one, builder.trunc(args[1], ir.IntType(32))), -1)
        return builder.sitofp(builder.and_(builder.fptosi(args[0], WORDS), field), VALUES)

    return lanes(lanes, types.intp), generate


@instruction
def joined(_context: Any, _low: Any, _high: Any, _bits: Any) -> Any:
    """Integers low | high << bits."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        low, high = (builder.fptosi(value, WORDS) for value in args[:2])
        shift = splat_word(builder, builder.trunc(args[2], ir.IntType(32)), 0)
        return builder.sitofp(builder.or_(low, builder.shl(high, shift)), VALUES)

    return lanes(lanes, lanes, types.intp), generate


@instruction
def truncate(_context: Any, _a: Any) -> Any:
    """Integers towards zero."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return unary(builder, "trunc", args[0])

    return lanes(lanes), generate


@instruction
def rounded(_context: Any, _a: Any) -> Any:
    """Nearest integers, ties away from zero."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return unary(builder, "round", args[0])

    return lanes(lanes), generate


@instruction
def upper(_context: Any, _a: Any, _bits: Any) -> Any:
    """Non-negative integers without their lowest `bits` bits: a // 2**bits."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        shift = splat_word(builder, builder.trunc(args[1], ir.IntType(32)), 0)
        return builder.sitofp(builder.lshr(builder.fptosi(args[0], WORDS), shift), VALUES)

    return lanes(lanes, types.intp), generate


def memory(context: Any, builder: Any, array_type: Any, array: Any, index: Any, kind: Any) -> Any:
    """Pointer to a vector of `kind` that begins `index` of its elements after the beginning of an array."""
    data = builder.bitcast(context.make_array(array_type)(context, builder, array).data, kind.element.as_pointer())
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def store_low_bits(bits: int) -> Callable[..., Any]:
    """What writes the lowest `bits` bits of integer lanes as consecutive integers of that size."""
    kind = ir.VectorType(ir.IntType(bits), WIDTH)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = memory(context, builder, signature.args[0], args[0], args[1], kind)
        builder.store(builder.trunc(builder.fptosi(args[2], WORDS), kind), place, align=1)
        return context.get_dummy_value()

    return generate


@instruction
def store_bytes(_context: Any, array: Any, _index: Any, _a: Any) -> Any:
    """Write integer lanes, each reduced to its low byte, to the uint8 `array[i : i + WIDTH]`."""
    return types.void(array, types.intp, lanes), store_low_bits(8)


@instruction
def store_halves(_context: Any, array: Any, _index: Any, _a: Any) -> Any:
    """Write integer lanes, each reduced to its low 16 bits, to `array`, seen as uint16, from its element i on."""
    return types.void(array, types.intp, lanes), store_low_bits(16)


@instruction
def load_halves(_context: Any, array: Any, _index: Any) -> Any:
    """Integer lanes with the uint16 `array[i : i + WIDTH]`."""
    kind = ir.VectorType(ir.IntType(16), WIDTH)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = builder.load(memory(context, builder, signature.args[0], args[0], args[1], kind), align=1)
        return builder.sitofp(builder.zext(stored, WORDS), VALUES)

    return lanes(array, types.intp), generate


@instruction
def store_nibbles(_context: Any, _array: Any, _index: Any, _a: Any) -> Any:
    """Write the low nibbles of integer lanes, lane i and lane i + WIDTH / 2 in byte `array[index + i]`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words = builder.and_(builder.fptosi(args[2], WORDS), constant(WORDS, 15))
        low, high = halves(builder, words, WIDTH // 2)
        octets = ir.VectorType(ir.IntType(8), WIDTH // 2)
        packed = builder.trunc(builder.or_(low, builder.shl(high, ir.Constant(HALF_WORDS, [4] * (WIDTH // 2)))), octets)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        builder.store(packed, builder.bitcast(builder.gep(data, [args[1]]), octets.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(_array, types.intp, lanes), generate


@instruction
def half_bits(_context: Any, _a: Any) -> Any:
    """Bits of the float16 nearest to each lane, as integers; the lanes' version of `half.narrow_f16`."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], WORDS)
        size = builder.and_(bits, constant(WORDS, 0x7FFFFFFF))
        moved = builder.bitcast(builder.fadd(builder.bitcast(size, VALUES), constant(VALUES, 0.5)), WORDS)
        tiny = builder.sub(moved, constant(WORDS, 0x3F000000))
        odd = builder.and_(builder.lshr(size, constant(WORDS, 13)), constant(WORDS, 1))
        normal = builder.add(builder.add(size, constant(WORDS, 0xC8000FFF)), odd)
        rounded = builder.lshr(normal, constant(WORDS, 13))
        below = builder.icmp_unsigned("<", size, constant(WORDS, 0x38800000))
        rounded = builder.select(below, tiny, rounded)
        for limit, word in ((0x477FF000, 0x7C00), (0x7F800001, 0x7E00)):
            beyond = builder.icmp_unsigned(">=", size, constant(WORDS, limit))
            rounded = builder.select(beyond, constant(WORDS, word), rounded)
        sign = builder.and_(builder.lshr(bits, constant(WORDS, 16)), constant(WORDS, 0x8000))
        return builder.sitofp(builder.or_(rounded, sign), VALUES)

    return lanes(lanes), generate


@instruction
def half_value(_context: Any, _a: Any) -> Any:
    """Values of float16 bits that are given as integers; the lanes' version of `half.widen_f16`."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = builder.fptosi(args[0], WORDS)
        size = builder.shl(builder.and_(word, constant(WORDS, 0x7FFF)), constant(WORDS, 13))
        finite = builder.fmul(builder.bitcast(size, VALUES), constant(VALUES, 2.0**112))
        exponent = constant(WORDS, 0x7C00)
        special = builder.icmp_signed("==", builder.and_(word, exponent), exponent)
        endless = builder.or_(size, constant(WORDS, 0x7F800000))
        bits = builder.select(special, endless, builder.bitcast(finite, WORDS))
        sign = builder.shl(builder.and_(word, constant(WORDS, 0x8000)), constant(WORDS, 16))
        return builder.bitcast(builder.or_(bits, sign), VALUES)

    return lanes(lanes), generate

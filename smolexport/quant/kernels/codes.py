"""Integers in lanes: rounding, bit fields, and codes of 2 to 8 bits in memory.

Integer lanes are float32 lanes whose values are whole numbers, exact up to 2^24.

    nearest(a)   codes(a, low, high)                         rounding
    upper(a, n)   low_bits(a, n)   joined(a, b, n)           bit fields: a >> n, a & 2^n - 1, a | b << n
    store_bytes(array, i, a)   store_nibbles(array, i, a)    to a uint8 array
    store_halves(array, i, a)   load_halves(array, i)        to and from uint16
    store_codes   store_limited   load_codes                 a bit stream
    reorder_nibbles   flip_top_bits   copy_bytes             from memory to memory

A bit stream is little-endian: element i is in bits [i * bits, (i + 1) * bits).  Codes are packed by halving the number
of fields: neighbours move together inside 16, then 32, then 64 bits, until a field is whole bytes; one shuffle then
drops the unused bytes in between.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from smolexport.quant.kernels.jit import ARRAY, CONSTANT, instruction
from smolexport.quant.kernels.lanes import (
    VALUES,
    WIDTH,
    WORD,
    WORDS,
    constant,
    filled,
    halves,
    lanes,
    shuffled,
    vector_at,
)

OCTETS = ir.VectorType(ir.IntType(8), WIDTH)
HALF_OCTETS = ir.VectorType(ir.IntType(8), WIDTH // 2)
SHORTS = ir.VectorType(ir.IntType(16), WIDTH)

# Adding this moves the integer nearest to a small float32, ties to even, into the low bits of its representation.
MAGIC, MAGIC_WORD = 12582912.0, 0x4B400000
MAGIC_ZERO = 0x400000
MAGIC_FIELD = 0x7FFFFF


def magic_field(builder: Any, value: Any) -> Any:
    """Words with the nearest integer plus MAGIC_ZERO; what is out of range wraps as in the reference."""
    moved = builder.bitcast(builder.fadd(value, constant(VALUES, MAGIC)), WORDS)
    return builder.and_(moved, constant(WORDS, MAGIC_FIELD))


def clamp(builder: Any, words: Any, low: Any, high: Any) -> Any:
    """Signed minimum and maximum."""
    words = builder.select(builder.icmp_signed("<", words, low), low, words)
    return builder.select(builder.icmp_signed(">", words, high), high, words)


def word_of(builder: Any, a: Any) -> Any:
    """Integer lanes as words."""
    return builder.fptosi(a, WORDS)


def integers(builder: Any, words: Any) -> Any:
    """Words as integer lanes."""
    return builder.sitofp(words, VALUES)


def filled_words(builder: Any, number: Any) -> Any:
    """Words that all hold an integer of the kernel."""
    return filled(builder, WORDS, builder.trunc(number, WORD))


@instruction(lanes, lanes)
def nearest(builder: Any, a: Any) -> Any:
    """Nearest integers, ties to even, as the reference computes them (beyond 2^22 that is not the nearest one)."""
    return integers(builder, builder.sub(magic_field(builder, a), constant(WORDS, MAGIC_ZERO)))


@instruction(lanes, lanes, types.intp, types.intp)
def codes(builder: Any, a: Any, low: Any, high: Any) -> Any:
    """`nearest(a)` limited to low ... high (integers, the same for all lanes)."""
    zero = constant(WORDS, MAGIC_ZERO)
    limits = (builder.add(filled_words(builder, limit), zero) for limit in (low, high))
    return integers(builder, builder.sub(clamp(builder, magic_field(builder, a), *limits), zero))


@instruction(lanes, lanes, types.intp)
def low_bits(builder: Any, a: Any, bits: Any) -> Any:
    """Integers reduced to their lowest `bits` bits, negative ones in two's complement."""
    power = builder.shl(constant(WORDS, 1), filled_words(builder, bits))
    return integers(builder, builder.and_(word_of(builder, a), builder.sub(power, constant(WORDS, 1))))


@instruction(lanes, lanes, lanes, types.intp)
def joined(builder: Any, low: Any, high: Any, bits: Any) -> Any:
    """Integers low | high << bits."""
    moved = builder.shl(word_of(builder, high), filled_words(builder, bits))
    return integers(builder, builder.or_(word_of(builder, low), moved))


@instruction(lanes, lanes, types.intp)
def upper(builder: Any, a: Any, bits: Any) -> Any:
    """Non-negative integers without their lowest `bits` bits: a // 2**bits."""
    return integers(builder, builder.lshr(word_of(builder, a), filled_words(builder, bits)))


@instruction(types.void, ARRAY, types.intp, lanes)
def store_bytes(builder: Any, data: Any, index: Any, a: Any) -> None:
    """Write integer lanes, each reduced to its low byte, to the uint8 `array[i : i + WIDTH]`."""
    builder.store(builder.trunc(word_of(builder, a), OCTETS), vector_at(builder, data, index, OCTETS), align=1)


@instruction(types.void, ARRAY, types.intp, lanes)
def store_halves(builder: Any, data: Any, index: Any, a: Any) -> None:
    """Write integer lanes, each reduced to its low 16 bits, to `array`, seen as uint16, from its element i on."""
    builder.store(builder.trunc(word_of(builder, a), SHORTS), vector_at(builder, data, index, SHORTS), align=1)


@instruction(lanes, ARRAY, types.intp)
def load_halves(builder: Any, data: Any, index: Any) -> Any:
    """Integer lanes with the uint16 `array[i : i + WIDTH]`."""
    return integers(builder, builder.zext(builder.load(vector_at(builder, data, index, SHORTS), align=1), WORDS))


@instruction(types.void, ARRAY, types.intp, lanes)
def store_nibbles(builder: Any, data: Any, index: Any, a: Any) -> None:
    """Write the low nibbles of integer lanes, lane i and lane i + WIDTH / 2 in byte `array[index + i]`."""
    low, high = halves(builder, builder.and_(word_of(builder, a), constant(WORDS, 15)))
    packed = builder.or_(low, builder.shl(high, constant(high.type, 4)))
    builder.store(builder.trunc(packed, HALF_OCTETS), vector_at(builder, data, index, HALF_OCTETS), align=1)


def steps(bits: int) -> list[tuple[int, int]]:
    """(bits of a container, bits of a field in it) after each halving; the last field is whole bytes."""
    container, found = 8, [(8, bits)]
    while bits % 8:
        container, bits = 2 * container, 2 * bits
        found.append((container, bits))
    return found


def containers(builder: Any, vector: Any, bits: int) -> Any:
    """`vector` seen as integers of `bits` bits."""
    return builder.bitcast(vector, ir.VectorType(ir.IntType(bits), 8 * WIDTH // bits))


def octet_shuffle(builder: Any, vector: Any, picks: list[int]) -> Any:
    """The bytes `picks` of a vector; the number of its bytes stands for a zero byte."""
    return shuffled(builder, vector, picks, constant(vector.type, 0))


def store_stream(builder: Any, data: Any, at: Any, words: Any, bits: int) -> None:
    """Store the low `bits` bits of words as a bit stream."""
    packed = builder.trunc(words, OCTETS)
    plan = steps(bits)
    for (_, field), (size, _) in pairwise(plan):
        packed = containers(builder, packed, size)
        mask = (1 << field) - 1
        high = builder.lshr(packed, constant(packed.type, size // 2 - field))
        low = builder.and_(packed, constant(packed.type, mask))
        packed = builder.or_(low, builder.and_(high, constant(packed.type, mask << field)))
    size, field = (width // 8 for width in plan[-1])
    picks = [start + i for start in range(0, WIDTH, size) for i in range(field)]
    packed = octet_shuffle(builder, builder.bitcast(packed, OCTETS), picks)
    builder.store(packed, vector_at(builder, data, at, packed.type), align=1)


@instruction(types.void, ARRAY, types.intp, lanes, CONSTANT)
def store_codes(builder: Any, data: Any, at: Any, a: Any, bits: int) -> None:
    """Write lanes from 0 on, rounded to nearest, ties to even, at most 2^bits - 1, to `array` from byte `at` on.

    `bits` is 1 to 8; 4 * bits bytes are written.
    """
    last = constant(WORDS, MAGIC_WORD + (1 << bits) - 1)
    words = builder.bitcast(builder.fadd(a, constant(VALUES, MAGIC)), WORDS)
    store_stream(builder, data, at, builder.select(builder.icmp_unsigned("<", words, last), words, last), bits)


@instruction(types.void, ARRAY, types.intp, lanes, CONSTANT)
def store_limited(builder: Any, data: Any, at: Any, a: Any, bits: int) -> None:
    """As `store_codes`, but of any lanes below 2^31 in magnitude: rounded towards zero, limited to 0 ... 2^bits - 1."""
    limits = (constant(WORDS, limit) for limit in (0, (1 << bits) - 1))
    store_stream(builder, data, at, clamp(builder, word_of(builder, a), *limits), bits)


@instruction(lanes, ARRAY, types.intp, CONSTANT)
def load_codes(builder: Any, data: Any, at: Any, bits: int) -> Any:
    """Lanes with the WIDTH codes that start at byte `at` of `array`."""
    plan = steps(bits)
    size, field = (width // 8 for width in plan[-1])
    kind = ir.VectorType(ir.IntType(8), WIDTH // size * field)
    stored = builder.load(vector_at(builder, data, at, kind), align=1)
    picks = [unit * field + i if i < field else kind.count for unit in range(WIDTH // size) for i in range(size)]
    spread = octet_shuffle(builder, stored, picks)
    for (_, field), (size, _) in reversed(list(pairwise(plan))):
        spread = containers(builder, spread, size)
        mask = (1 << field) - 1
        high = builder.and_(spread, constant(spread.type, mask << field))
        high = builder.shl(high, constant(spread.type, size // 2 - field))
        spread = builder.or_(builder.and_(spread, constant(spread.type, mask)), high)
    return builder.uitofp(builder.zext(builder.bitcast(spread, OCTETS), WORDS), VALUES)


@instruction(types.void, ARRAY, types.intp, ARRAY, types.intp)
def reorder_nibbles(builder: Any, source: Any, at: Any, target: Any, to: Any) -> None:
    """Copy 16 bytes of nibbles: elements j and j + 16 share byte j of the source, 2j and 2j + 1 that of the target."""
    stored = builder.load(vector_at(builder, source, at, HALF_OCTETS), align=1)
    four = constant(HALF_OCTETS, 4)
    low, high = builder.and_(stored, constant(HALF_OCTETS, 15)), builder.lshr(stored, four)
    even, odd = (shuffled(builder, low, list(range(start, WIDTH, 2)), high) for start in (0, 1))
    packed = builder.or_(even, builder.shl(odd, four))
    builder.store(packed, vector_at(builder, target, to, HALF_OCTETS), align=1)


@instruction(types.void, ARRAY, types.intp, ARRAY, types.intp)
def flip_top_bits(builder: Any, source: Any, at: Any, target: Any, to: Any) -> None:
    """Copy WIDTH bytes with the top bit of each flipped: signed bytes become bytes that start at -128."""
    stored = builder.load(vector_at(builder, source, at, OCTETS), align=1)
    builder.store(builder.xor(stored, constant(OCTETS, 128)), vector_at(builder, target, to, OCTETS), align=1)


@instruction(types.void, ARRAY, types.intp, ARRAY, types.intp, types.intp)
def copy_bytes(builder: Any, source: Any, at: Any, target: Any, to: Any, count: Any) -> None:
    """Copy `count` bytes from byte `at` of the memory of one array to byte `to` of that of another."""
    pointers = (builder.gep(builder.bitcast(d, cgutils.voidptr_t), [i]) for d, i in ((target, to), (source, at)))
    cgutils.raw_memcpy(builder, *pointers, count, 1)

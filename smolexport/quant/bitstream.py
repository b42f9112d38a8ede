"""Codes of 2 to 8 bits as one little-endian bit stream: element i in bits [i * bits, (i + 1) * bits).

Codes are packed by halving the number of fields: neighbours move together inside 16, then 32, then 64 bits, until a
field is whole bytes, and what is left over in between is dropped by one shuffle.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from smolexport.quant.jit import instruction
from smolexport.quant.lane_codes import MAGIC, clamp
from smolexport.quant.lanes import VALUES, WIDTH, WORDS, constant, lanes

MAGIC_WORD = 0x4B400000  # the bits of MAGIC
OCTETS = ir.VectorType(ir.IntType(8), WIDTH)


def steps(bits: int) -> list[tuple[int, int]]:
    """(bits of a container, bits of a field in it) after each halving; the last field is whole bytes."""
    container, found = 8, [(8, bits)]
    while bits % 8:
        container, bits = 2 * container, 2 * bits
        found.append((container, bits))
    return found


def containers(builder: Any, vector: Any, bits: int) -> tuple[Any, Any]:
    """`vector` seen as integers of `bits` bits, and a maker of constants of that type."""
    kind = ir.VectorType(ir.IntType(bits), 8 * WIDTH // bits)
    return builder.bitcast(vector, kind), lambda value: ir.Constant(kind, [value] * kind.count)


def octet_shuffle(builder: Any, vector: Any, picks: list[int]) -> Any:
    """The bytes `picks` of a vector; WIDTH stands for a zero byte."""
    zeros = ir.Constant(vector.type, [0] * vector.type.count)
    return builder.shuffle_vector(vector, zeros, ir.Constant(ir.VectorType(ir.IntType(32), len(picks)), picks))


def byte_address(context: Any, builder: Any, array_type: Any, place: Any, kind: Any) -> Any:
    """Pointer to something of type `kind` at `place`: an array and a byte of its memory."""
    array, index = place
    data = builder.bitcast(context.make_array(array_type)(context, builder, array).data, cgutils.voidptr_t)
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def packed_codes(bits: Any, to_words: Callable[[Any, Any], Any]) -> Callable[..., Any] | None:
    """What stores the low `bits` bits of the integers that `to_words` makes of lanes as a bit stream."""
    if not isinstance(bits, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        packed = builder.trunc(to_words(builder, args[2]), OCTETS)
        plan = steps(bits.literal_value)
        for (_, field), (size, _) in pairwise(plan):
            packed, every = containers(builder, packed, size)
            mask = (1 << field) - 1
            high = builder.lshr(packed, every(size // 2 - field))
            packed = builder.or_(builder.and_(packed, every(mask)), builder.and_(high, every(mask << field)))
        size, field = (width // 8 for width in plan[-1])
        picks = [start + i for start in range(0, WIDTH, size) for i in range(field)]
        packed = octet_shuffle(builder, builder.bitcast(packed, OCTETS), picks)
        builder.store(packed, byte_address(context, builder, signature.args[0], args[:2], packed.type), align=1)
        return context.get_dummy_value()

    return generate


@instruction
def store_codes(_context: Any, array: Any, _index: Any, _a: Any, bits: Any) -> Any:
    """Write lanes from 0 on, rounded to nearest, ties to even, at most 2^bits - 1, to `array` from byte i on.

    `bits` must be a constant of the kernel, 1 to 8; 4 * bits bytes are written.
    """

    def to_words(builder: Any, a: Any) -> Any:
        last = constant(WORDS, MAGIC_WORD + (1 << bits.literal_value) - 1)
        words = builder.bitcast(builder.fadd(a, constant(VALUES, MAGIC)), WORDS)
        return builder.select(builder.icmp_unsigned("<", words, last), words, last)

    generate = packed_codes(bits, to_words)
    return (types.void(array, types.intp, lanes, bits), generate) if generate else None


@instruction
def store_limited(_context: Any, array: Any, _index: Any, _a: Any, bits: Any) -> Any:
    """As `store_codes`, but of any lanes below 2^31 in magnitude: rounded towards zero, limited to 0 ... 2^bits - 1."""

    def to_words(builder: Any, a: Any) -> Any:
        limits = (constant(WORDS, limit) for limit in (0, (1 << bits.literal_value) - 1))
        return clamp(builder, builder.fptosi(a, WORDS), *limits)

    generate = packed_codes(bits, to_words)
    return (types.void(array, types.intp, lanes, bits), generate) if generate else None


@instruction
def load_codes(_context: Any, array: Any, _index: Any, bits: Any) -> Any:
    """Lanes with the WIDTH codes that start at byte i of the uint8 `array`; `bits` must be a constant of the kernel."""
    if not isinstance(bits, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        plan = steps(bits.literal_value)
        size, field = (width // 8 for width in plan[-1])
        kind = ir.VectorType(ir.IntType(8), WIDTH // size * field)
        stored = builder.load(byte_address(context, builder, signature.args[0], args[:2], kind), align=1)
        places = [unit * field + i if i < field else kind.count for unit in range(WIDTH // size) for i in range(size)]
        spread = octet_shuffle(builder, stored, places)
        for (_, field), (size, _) in reversed(list(pairwise(plan))):
            spread, every = containers(builder, spread, size)
            mask = (1 << field) - 1
            high = builder.shl(builder.and_(spread, every(mask << field)), every(size // 2 - field))
            spread = builder.or_(builder.and_(spread, every(mask)), high)
        return builder.uitofp(builder.zext(builder.bitcast(spread, OCTETS), WORDS), VALUES)

    return lanes(array, types.intp, bits), generate


@instruction
def reorder_nibbles(_context: Any, source: Any, _at: Any, target: Any, _to: Any) -> Any:
    """Copy 16 bytes of nibbles: elements j and j + 16 share byte j of the source, 2j and 2j + 1 that of the target."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = WIDTH // 2
        kind = ir.VectorType(ir.IntType(8), half)
        fours = ir.Constant(kind, [4] * half)
        stored = builder.load(byte_address(context, builder, signature.args[0], args[:2], kind), align=1)
        low, high = builder.and_(stored, ir.Constant(kind, [15] * half)), builder.lshr(stored, fours)
        picks = [ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(odd, WIDTH, 2))) for odd in (0, 1)]
        even, odd = (builder.shuffle_vector(low, high, pick) for pick in picks)
        packed = builder.or_(even, builder.shl(odd, fours))
        builder.store(packed, byte_address(context, builder, signature.args[2], args[2:], kind), align=1)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), generate


@instruction
def flip_top_bits(_context: Any, source: Any, _at: Any, target: Any, _to: Any) -> Any:
    """Copy WIDTH bytes with the top bit of each turned: signed bytes become bytes that start at -128."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = builder.load(byte_address(context, builder, signature.args[0], args[:2], OCTETS), align=1)
        flipped = builder.xor(stored, ir.Constant(OCTETS, [128] * WIDTH))
        builder.store(flipped, byte_address(context, builder, signature.args[2], args[2:], OCTETS), align=1)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), generate


@instruction
def copy_bytes(_context: Any, source: Any, _at: Any, target: Any, _to: Any, _count: Any) -> Any:
    """Copy `count` bytes from byte `at` of the memory of one array to byte `to` of that of another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        places = [byte_address(context, builder, signature.args[i], args[i : i + 2], ir.IntType(8)) for i in (0, 2)]
        cgutils.raw_memcpy(builder, places[1], places[0], args[4], 1)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp, types.intp), generate

"""The wire format of protocol buffers: as much of it as an ONNX graph needs, written and read without a library.

A message is a run of fields; a field is a key (number and kind) and a value.  Nothing here recurses, every length is
checked against what is there and fields come one by one, so that whoever reads a hostile file can count them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

__all__ = [
    "Value",
    "WireError",
    "bytes_field",
    "fields",
    "float_field",
    "int_field",
    "integers",
    "packed",
    "text",
    "to_signed",
]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Value = int | bytes


class WireError(ValueError):
    """The bytes are no message."""


def _varint(value: int) -> bytes:
    """`value` in groups of seven bits, the lowest first; a negative number as its 64-bit two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def int_field(number: int, value: int) -> bytes:
    """An integer of at most 64 bits."""
    return _varint(number << 3 | VARINT) + _varint(value)


def bytes_field(number: int, value: bytes | str) -> bytes:
    """Bytes, text in UTF-8, or a message."""
    data = value.encode("utf-8", "replace") if isinstance(value, str) else value
    return _varint(number << 3 | BYTES) + _varint(len(data)) + data


def float_field(number: int, value: float) -> bytes:
    """A 32-bit float."""
    return _varint(number << 3 | FIXED32) + struct.pack("<f", value)


def packed(number: int, values: Iterable[int]) -> bytes:
    """A list of integers in one field."""
    return bytes_field(number, b"".join(map(_varint, values)))


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Every field of the message `data`: its number, and an unsigned integer or the bytes of its value.

    Raises:
        WireError: cut off, or of a kind that no message has.
    """
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        match key & 7:
            case 0:
                value, at = _read_varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _read_varint(data, at)
            case 5:
                size = 4
            case kind:
                raise WireError(f"a field of kind {kind}")
        if size > len(data) - at:
            raise WireError("a field that ends behind the message")
        yield key >> 3, data[at : at + size]
        at += size


def integers(value: Value) -> Iterator[int]:
    """The signed integers of a repeated field, packed or a single one."""
    if isinstance(value, int):
        yield to_signed(value)
        return
    at = 0
    while at < len(value):
        number, at = _read_varint(value, at)
        yield to_signed(number)


def to_signed(value: int) -> int:
    """An integer field as a signed number."""
    return value - (1 << 64) if value >> 63 else value


def text(value: Value) -> str:
    """A field of text; raises WireError when it is none."""
    if isinstance(value, int):
        raise WireError("a number where text belongs")
    return value.decode("utf-8", "backslashreplace")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise WireError("a number that does not end")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value & (1 << 64) - 1, at

"""Protocol buffers as far as a graph has to be looked at before a library opens it: fields of bytes, one by one.

Nothing is copied and nothing is unpacked that is not asked for, so that a graph with gigabytes of weights inside
costs no more than one without.  Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

from smolexport.errors import FileFormatError

__all__ = ["Message", "integers", "read_message", "text"]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
LONGEST_VARINT = 10  # bytes
LONGEST_TEXT = 4096  # bytes of a name
HIGHEST_RANK = 64  # of any shape
MOST_FIELDS = 1 << 20  # of one message: each costs more memory here than in the file

Message = dict[int, list["int | memoryview"]]
"""Field number -> its values in order: integers, or the bytes of texts, messages and packed lists."""


def read_message(data: memoryview) -> Message:
    """The fields of one message, nested ones as bytes.  Floating-point fields are left out.

    Raises:
        FileFormatError: the bytes are no message; without the file's name.
    """
    fields: Message = {}
    at = count = 0
    while at < len(data):
        count += 1
        if count > MOST_FIELDS:
            raise FileFormatError(f"a message has more than {MOST_FIELDS} fields")
        key, at = _varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            fields.setdefault(key >> 3, []).append(value)
            continue
        size, at = _varint(data, at) if kind == BYTES else ({FIXED64: 8, FIXED32: 4}.get(kind, -1), at)
        if size < 0:
            raise FileFormatError(f"byte {at} of a message starts a field of the unknown kind {kind}")
        if at + size > len(data):
            raise FileFormatError(f"a field of {size} bytes reaches beyond the end of its message")
        if kind == BYTES:
            fields.setdefault(key >> 3, []).append(data[at : at + size])
        at += size
    return fields


def integers(message: Message, field: int) -> list[int]:
    """All values of a repeated int64 field, packed or not.

    Raises:
        FileFormatError: damaged, or more values than any shape has.
    """
    values = message.get(field, ())
    if len(values) > HIGHEST_RANK or any(
        not isinstance(v, int) and len(v) > LONGEST_VARINT * HIGHEST_RANK for v in values
    ):
        raise FileFormatError(f"field {field} should be a number or a shape")
    return [number for value in values for number in _unpacked(value)]


def text(message: Message, field: int) -> str:
    """The last value of a text field, as readers take it; "" without one.

    Raises:
        FileFormatError: not UTF-8, or longer than any name.
    """
    value = message.get(field, [memoryview(b"")])[-1]
    if isinstance(value, int) or len(value) > LONGEST_TEXT:
        raise FileFormatError(f"field {field} should be a name")
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"a name is not UTF-8: {error}") from error


def _unpacked(value: int | memoryview) -> Iterator[int]:
    if isinstance(value, int):
        yield _signed(value)
        return
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        yield _signed(number)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, position after it)."""
    value = 0
    for place, byte in enumerate(data[at : at + LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value & ((1 << 64) - 1), at + place + 1
    raise FileFormatError("an integer does not end")

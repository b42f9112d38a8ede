"""Protobuf files, parsed by the library of their format after a check of what that may cost.

Two bytes of a file can become 200 in memory, so the fields of a large file are counted first.
Encoding: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from smolexport.errors import FileFormatError
from smolexport.files import open_regular
from smolexport.text import reason

MOST_FIELDS = 1 << 20  # in all messages of a file


def read_message(path: Path, kind: Any) -> Any:
    """The message in the file `path`, of the generated class `kind`; text that is not UTF-8 is returned as bytes.

    Raises:
        FileFormatError: missing, damaged, or with more than `MOST_FIELDS` fields.
    """
    from google.protobuf.message import DecodeError

    try:
        with open_regular(path) as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b"")
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path}: cannot be read ({reason(error)})") from error
    try:
        if len(data) > 2 * MOST_FIELDS:  # a field has at least two bytes
            _count(data, kind.DESCRIPTOR, MOST_FIELDS)
        return kind.FromString(data)
    except (DecodeError, RecursionError, ValueError) as error:
        name = kind.DESCRIPTOR.file.package.upper()
        raise FileFormatError(f"{path}: is damaged or not an {name} file ({reason(error)})") from error


def _count(data: memoryview, kind: Any, left: int) -> int:
    """`left` minus the fields of `data`, a message of type `kind`, and of the messages in it.

    Each byte of a packed list counts as a field.  Raises ValueError if that is negative or an integer does not end.
    """
    at = 0
    while at < len(data):
        left -= 1
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                _, at = _varint(data, at)
            case 1:
                at += 8
            case 5:
                at += 4
            case 2:
                size, at = _varint(data, at)
                field = kind.fields_by_number.get(key >> 3)
                if field is not None and field.message_type is not None:
                    left = _count(data[at : at + size], field.message_type, left)
                elif field is not None and field.type not in (field.TYPE_BYTES, field.TYPE_STRING):
                    left -= size
                at += size
        if left < 0:
            raise ValueError(f"more than {MOST_FIELDS:,} fields")
    return left


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, position after it)."""
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("an integer does not end")

"""Damaging files on purpose at random, but reproducibly, and where it hurts; and what every reader of them owes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from smolexport.errors import SmolexportError

__all__ = ["NASTY", "NUMBERS", "changed_bytes", "changed_json", "read_or_refused"]

LONGEST = 400  # characters of a message beside the path
# JSON texts: numbers without a value, too large, too long; texts that are none; depth; what is of another kind
NASTY = (
    "1e400", "-1e400", "NaN", "-Infinity", "1" * 5000, "9" * 30, str(2**63), str(2**64), "-1", "0", "1.5", "true",
    "null", '"\\ud800"', '"a\\u0000b"', '"a\\n\\u001b[31m"', json.dumps("x" * 100_000), '""', "[" * 3000 + "]" * 3000,
    '{"a":' * 500 + "1" + "}" * 500, "[]", "[[]]", "{}", '[1, [2]]', '"../../x"',
)  # fmt: skip
NUMBERS = (0, 1, 2, 7, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
MARK = "a place to be filled"


def read_or_refused(read: Callable[[], object], path: Path) -> bool:
    """Whether `read` refuses what stands in `path`, which it does in one line that names it, or not at all."""
    try:
        read()
    except SmolexportError as error:
        message = str(error)
        assert str(path) in message, message[:1000]
        assert len(message) - len(str(path)) <= LONGEST, message[:1000]
        assert "\n" not in message
        return True
    return False


def changed_json(random: Random, value: Any) -> bytes:
    """`value` as JSON with one part replaced, renamed, removed or repeated, or damaged as `changed_bytes` does."""
    top = {"": json.loads(json.dumps(value))}
    holder, key = random.choice(list(_places(top)))
    nasty = random.choice(NASTY)
    match random.randrange(5):
        case 0 if isinstance(holder, dict) and holder is not top:
            holder[MARK] = holder.pop(key)
            nasty = nasty if nasty.startswith('"') else json.dumps(nasty)
        case 1 if holder is not top:
            holder.pop(key)
        case 2 if isinstance(holder, list):
            holder += [MARK] * 3
        case 3:
            return changed_bytes(random, json.dumps(value).encode())
        case _:
            holder[key] = MARK
    return json.dumps(top[""]).replace(json.dumps(MARK), nasty).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of everything in JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield value, key
        yield from _places(one)


def changed_bytes(random: Random, data: bytes, extra: bytes = b"()[]{},:'\"\\\n#0x1e9_L\x00\xff") -> bytes:
    """`data` cut, or with bytes replaced, put in or taken out, or a number of 4 or 8 bytes replaced."""
    found, place = bytearray(data), random.randrange(max(1, len(data)))
    match random.randrange(5):
        case 0:
            return bytes(found[:place])
        case 1:
            for _ in range(random.choice((1, 3, 30))):
                found[random.randrange(len(found))] = random.randrange(256)
        case 2:
            found[place:place] = bytes(random.choice(extra) for _ in range(random.choice((1, 4, 400))))
        case 3:
            del found[place : place + random.choice((1, 4, 32))]
        case _:
            size = random.choice((4, 8))
            found[place : place + size] = (random.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(found)

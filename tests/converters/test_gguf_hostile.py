"""GGUF files from strangers: read, or refused with one clear line; never another exception, never much memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import smolexport_to_gguf
from smolexport.errors import FileFormatError
from smolexport.quant import FORMATS
from smolexport_to_gguf.container import header_bytes, padding, read_gguf
from tests.cli.commands import assert_refused, call

MEMORY = 50 << 20
U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + raw


def info(name: str = "t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(keys: list[bytes], tensors: list[bytes], data: int = 64, *, tensor_count: int | None = None,
         key_count: int | None = None, version: int = 3, magic: bytes = b"GGUF") -> bytes:  # fmt: skip
    """A file put together by hand, with counts that may lie."""
    counts = (len(tensors) if tensor_count is None else tensor_count, len(keys) if key_count is None else key_count)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + data)


ALIGN = "general.alignment"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "magic only": (b"GGUF", "is not a GGUF file"),
    "another magic": (file([], [], magic=b"GGML"), "is not a GGUF file"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "version 50331648"),
    "version 1": (file([], [], version=1), "GGUF version 1; only version 3 is read"),
    "version 2": (file([], [], version=2), "GGUF version 2; only version 3 is read"),
    "2^64 keys": (file([], [], key_count=2**64 - 1), "the key"),
    "2^63 tensors": (file([], [info()], tensor_count=2**63), "dimensions"),
    "key of 2^62 bytes": (file([struct.pack("<Q", 2**62)], []), "4,611,686,018,427,387,904 bytes are promised"),
    "text of 2^64 bytes": (file([key("k", STRING, struct.pack("<Q", 2**64 - 1))], []), "bytes are promised"),
    "2^61 strings": (file([key("k", ARRAY, struct.pack("<IQ", STRING, 2**61))], []), "an array promises"),
    "2^64 numbers": (file([key("k", ARRAY, struct.pack("<IQ", U32, 2**64 - 1))], []), "bytes are promised"),
    "nested array": (file([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1))], []), "metadata value type 9 is unknown"),
    "array of type 99": (file([key("k", ARRAY, struct.pack("<IQ", 99, 1))], []), "metadata value type 99 is unknown"),
    "value of type 13": (file([key("k", 13, bytes(8))], []), "metadata value type 13 is unknown"),
    "key twice": (file([key("k", U32, bytes(4))] * 2, []), "the key k stands twice"),
    "tensor twice": (file([], [info(), info()]), "the tensor t stands twice"),
    "no dimensions": (file([], [info(dims=())]), "the tensor t has 0 dimensions"),
    "5 dimensions": (file([], [info(dims=(1,) * 5)]), "the tensor t has 5 dimensions"),
    "2^32 dimensions": (file([], [text("t") + b"\xff" * 4]), "has 4294967295 dimensions"),
    "huge dimensions": (file([], [info(dims=(2**63, 2**63))]), "the tensor t reaches beyond the end"),
    "dimension 0": (file([], [info(dims=(0,))]), "rows of 0"),
    "odd rows": (file([], [info(dims=(33,), kind=8)]), "has rows of 33, no multiple of its block"),
    "type 99": (file([], [info(kind=99)]), "tensor t has ggml type 99, which is not read; known: f32"),
    "removed type 4": (file([], [info(kind=4)]), "tensor t has ggml type 4"),
    "offset overflow": (file([], [info(offset=2**64 - 32)]), "the tensor t reaches beyond the end"),
    "offset beyond": (file([], [info(offset=64)]), "the tensor t reaches beyond the end"),
    "crooked offset": (file([], [info(offset=4)]), "no multiple of the alignment 32"),
    "no data": (file([], [info(dims=(40,))]), "the tensor t reaches beyond the end"),
    "alignment 0": (file([key(ALIGN, U32, struct.pack("<I", 0))], [info()]), "general.alignment is 0"),
    "alignment 24": (file([key(ALIGN, U32, struct.pack("<I", 24))], [info()]), "general.alignment is 24"),
    "alignment of text": (file([key(ALIGN, STRING, text("32"))], [info()]), "general.alignment is '32' (string)"),
    "alignment of a list": (file([key(ALIGN, ARRAY, struct.pack("<IQI", U32, 1, 32))], [info()]), "alignment is"),
    "negative alignment": (file([key(ALIGN, 5, struct.pack("<i", -32))], [info()]), "general.alignment is -32"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_refused(fault: str, tmp_path: Path) -> None:
    content, said = HOSTILE[fault]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError) as caught:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    if content[:4] == b"GGUF":
        for command in (("inspect", path), ("inspect", "--json", path)):
            assert_refused(call(*command), path, said)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound file with every kind of thing in it, in a few hundred bytes."""
    metadata = [
        ("general.architecture", "string", "llama"), ("a", "u32", 7), ("b", "f32", 0.5), ("c", "bool", True),
        ("d", "[string]", ["x", "yz"]), ("e", "[i32]", [1, 2, 3]), ("general.alignment", "u32", 32),
    ]  # fmt: skip
    shapes = [("first", (2, 3), "f32"), ("second", (1, 32), "q8_0")]
    rows = [(name, shape, FORMATS[form]) for name, shape, form in shapes]
    data = b"".join(bytes(f.size(s) + padding(f.size(s))) for _, s, f in rows)
    return header_bytes(metadata, rows) + data


def survives(path: Path, content: bytes) -> bool:
    """Whether the file is read; anything but FileFormatError for one that is not fails the test."""
    path.write_bytes(content)
    try:
        smolexport_to_gguf.describe(path)
    except FileFormatError:
        return False
    return True


def test_every_prefix(small: bytes, tmp_path: Path) -> None:
    """Cut anywhere before the last tensor's last byte it is refused, and only there."""
    last = FORMATS["q8_0"].size((1, 32))
    end = len(small) - padding(last)
    for size in range(len(small)):
        assert survives(tmp_path / "x.gguf", small[:size]) == (size >= end), size


def fuzz(small: bytes, change: Callable[[np.random.Generator, bytearray], None], path: Path, count: int) -> int:
    """How many of `count` changed files are still read; the memory never grows beyond 50 MB."""
    random, alive = np.random.default_rng(11), 0
    tracemalloc.start()
    try:
        for _ in range(count):
            changed = bytearray(small)
            change(random, changed)
            alive += survives(path, bytes(changed))
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    return alive


def test_random_bytes(small: bytes, tmp_path: Path) -> None:
    def change(random: np.random.Generator, content: bytearray) -> None:
        for _ in range(random.integers(1, 5)):
            content[random.integers(4, len(content))] = random.integers(0, 256)

    assert 0 < fuzz(small, change, tmp_path / "x.gguf", 300) < 300


def test_random_large_numbers(small: bytes, tmp_path: Path) -> None:
    """Eight bytes anywhere become a number that is just too large in some way."""

    def change(random: np.random.Generator, content: bytearray) -> None:
        where = int(random.integers(8, len(content) - 8))
        value = int(random.choice([2**31, 2**32, 2**40])) * int(random.integers(1, 2**20)) - int(random.integers(0, 3))
        content[where : where + 8] = struct.pack("<Q", value % 2**64)

    fuzz(small, change, tmp_path / "x.gguf", 300)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    for path, said in {tmp_path: "Is a directory", tmp_path / "nothing": "No such file"}.items():
        with pytest.raises(FileFormatError, match=said):
            read_gguf(path)
    assert_refused(call("inspect", tmp_path), tmp_path, "none of the known formats")


def test_names_cannot_drive_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b[2Jevil\nname"
    path = tmp_path / "x.gguf"
    path.write_bytes(file([key(evil, STRING, text(evil))], [info(evil)]))
    outcome = call("inspect", path)
    assert outcome.code == 0
    assert "\x1b" not in outcome.out + outcome.err
    assert "?[2Jevil?name" in outcome.out
    assert json.loads(call("inspect", "--json", path).out)["tensors"][0]["name"] == evil


def test_numbers_that_json_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    nan = [key("nan", 6, struct.pack("<f", np.nan)), key("list", ARRAY, struct.pack("<IQ2f", 6, 2, np.inf, 1))]
    path.write_bytes(file(nan, [info()]))
    metadata = json.loads(call("inspect", "--json", path).out)["metadata"]
    assert metadata == {"nan": "nan", "list": ["inf", 1.0]}


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(file([key("name", STRING, text(b"\xff\xfe"))], [info()]))
    assert json.loads(call("inspect", "--json", path).out)["metadata"]["name"] == "\ufffd\ufffd"


def test_metadata_of_other_kinds_than_expected(tmp_path: Path) -> None:
    """A name that is a number and an architecture that is a list are shown, not believed."""
    path = tmp_path / "x.gguf"
    keys = [key("general.name", U32, bytes(4)), key("general.architecture", ARRAY, struct.pack("<IQ", STRING, 0)),
            key("general.file_type", STRING, text("x"))]  # fmt: skip
    path.write_bytes(file(keys, [info()]))
    facts = json.loads(call("inspect", "--json", path).out)
    assert (facts["name"], facts["architecture"], facts["scheme"]) == ("0", "[]", "file type x")

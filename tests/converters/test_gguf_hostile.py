"""GGUF files from strangers: read, or refused with one clear line; never another exception, never much memory."""

from __future__ import annotations

import json
import re
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
U32, BOOL, STRING, ARRAY = 4, 7, 8, 9
FILE_TYPE = "general.file_type"


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
    "version 1": (file([], [], version=1), "GGUF version 1; only version 3 is supported"),
    "version 2": (file([], [], version=2), "GGUF version 2; only version 3 is supported"),
    "2^64 keys": (file([], [], key_count=2**64 - 1), "18,446,744,073,709,551,615 keys, more than any model"),
    "2^63 tensors": (file([], [info()], tensor_count=2**63), "9,223,372,036,854,775,808 tensors, more than any model"),
    "key of 2^62 bytes": (file([struct.pack("<Q", 2**62)], []), "a key has a name of 4,611,686,018,427,387,904 bytes"),
    "text of 2^64 bytes": (file([key("k", STRING, struct.pack("<Q", 2**64 - 1))], []), "bytes are promised"),
    "2^61 strings": (file([key("k", ARRAY, struct.pack("<IQ", STRING, 2**61))], []), "more than any model"),
    "2^64 numbers": (file([key("k", ARRAY, struct.pack("<IQ", U32, 2**64 - 1))], []), "more than any model"),
    "nested array": (file([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1))], []), "metadata value type 9 is unknown"),
    "array of type 99": (file([key("k", ARRAY, struct.pack("<IQ", 99, 1))], []), "metadata value type 99 is unknown"),
    "value of type 13": (file([key("k", 13, bytes(8))], []), "metadata value type 13 is unknown"),
    "key twice": (file([key("k", U32, bytes(4))] * 2, []), "the key k appears twice"),
    "tensor twice": (file([], [info(), info()]), "the tensor t appears twice"),
    "no dimensions": (file([], [info(dims=())]), "the tensor t has 0 dimensions"),
    "5 dimensions": (file([], [info(dims=(1,) * 5)]), "the tensor t has 5 dimensions"),
    "2^32 dimensions": (file([], [text("t") + b"\xff" * 4]), "has 4294967295 dimensions"),
    "huge dimensions": (file([], [info(dims=(2**63, 2**63))]), "the tensor t reaches beyond the end"),
    "dimension 0": (file([], [info(dims=(0,))]), "rows of 0"),
    "odd rows": (file([], [info(dims=(33,), kind=8)]), "has rows of 33, not a multiple of its block"),
    "type 99": (file([], [info(kind=99)]), "tensor t has ggml type 99, which is not supported; known: f32"),
    "removed type 4": (file([], [info(kind=4)]), "tensor t has ggml type 4"),
    "offset overflow": (file([], [info(offset=2**64 - 32)]), "the tensor t reaches beyond the end"),
    "offset beyond": (file([], [info(offset=64)]), "the tensor t reaches beyond the end"),
    "crooked offset": (file([], [info(offset=4)]), "not a multiple of the alignment 32"),
    "a million keys": (file([], [], key_count=1 << 20, data=1 << 24), "1,048,576 keys, more than any model"),
    "a million tensors": (file([], [], tensor_count=1 << 20, data=1 << 24), "1,048,576 tensors, more than any model"),
    "more strings than bytes": (file([key("k", ARRAY, struct.pack("<IQ", STRING, 1 << 20))], []), "inside an array of"),
    "more numbers than bytes": (file([key("k", ARRAY, struct.pack("<IQ", U32, 1 << 20))], []), "bytes are promised"),
    "more values in several arrays": (
        file([key(f"k{n}", ARRAY, struct.pack("<IQ", BOOL, 1 << 20) + bytes(1 << 20)) for n in range(5)], []),
        "arrays of the metadata promise 5,242,880 values, more than any model",
    ),
    "tensors that overlap": (
        file([], [info("a"), info("b", dims=(40,)), info("c", offset=160)], data=192),
        "the tensors a and b share their bytes",
    ),
    "a long key": (file([key("k" * 70_000, U32, bytes(4))], []), "a key has a name of 70,000 bytes"),
    "a long tensor name": (file([], [info("t" * 70_000)]), "a tensor has a name of 70,000 bytes"),
    "a long key twice": (file([key("k" * 60_000, U32, bytes(4))] * 2, []), "the key kkk"),
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
    assert r"\x1b[2Jevil\nname" in outcome.out
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
    """A name that is a number and an architecture that is a list are shown with the rest, and not believed."""
    path = tmp_path / "x.gguf"
    numbers = struct.pack("<IQII", U32, 2, 1, 2)
    for kind, raw in ((ARRAY, numbers), (ARRAY, struct.pack("<IQ", STRING, 0)), (U32, bytes(4)), (BOOL, b"\x01")):
        keys = [key(name, kind, raw) for name in ("general.name", "general.architecture", "smolexport.scheme")]
        wrong = [key("general.file_type", ARRAY if kind == U32 else kind, numbers if kind == U32 else raw)]
        path.write_bytes(file([*keys, *wrong], [info()]))
        outcome = call("inspect", "--json", path)
        assert outcome.code == 0, outcome.err
        facts = json.loads(outcome.out)
        assert (facts["name"], facts["architecture"], facts["scheme"]) == ("x", "?", "?")
        assert set(facts["metadata"]) == {"general.name", "general.architecture", "smolexport.scheme", FILE_TYPE}
        assert facts["findings"] == ["general.architecture is missing or not text; llama.cpp does not load such a file"]
        assert facts["fingerprint"] is None
        told = call("inspect", path)
        assert (told.code, told.out.splitlines()[0]) == (0, f"{path}: gguf ?, ?, 'x'")
        assert f"note: {facts['findings'][0]}\n" in told.err
        assert "no weights fingerprint" in told.err


LENGTH, ROPE, HEADS, WIDTH = (
    f"llama.{name}"
    for name in ("attention.key_length", "rope.dimension_count", "attention.head_count", "embedding_length")
)
# Keys that tell how long a head is, and that length or why the file is refused.
LENGTHS: list[tuple[dict[str, object], int | str]] = [
    ({LENGTH: 4}, 4),
    ({LENGTH: 4, ROPE: 2}, 4),
    ({ROPE: 2}, 2),
    ({HEADS: 2, WIDTH: 8}, 4),
    ({LENGTH: 3}, "attention.key_length) is 3, not a positive even number"),
    ({LENGTH: 3, ROPE: 2, HEADS: 2, WIDTH: 8}, "attention.key_length) is 3, not a positive even number"),
    ({LENGTH: 0}, "attention.key_length) is 0, not a positive even number"),
    ({LENGTH: [4, 4]}, "attention.key_length) is not an integer"),
    ({ROPE: 5}, "rope.dimension_count) is 5, not a positive even number"),
    ({HEADS: 2, WIDTH: 6}, "embedding_length / llama.attention.head_count) is 3, not a positive even number"),
    ({HEADS: 3, WIDTH: 8}, "has no head length"),
    ({HEADS: 0, WIDTH: 8}, "has no head length"),
    ({HEADS: [2, 2], WIDTH: 8}, "has no head length"),
    ({}, "has no head length"),
]


@pytest.mark.parametrize(("told", "expected"), LENGTHS)
def test_the_length_of_a_head(told: dict[str, object], expected: int | str, tmp_path: Path) -> None:
    """Query and key rows go back to their places head by head: a length that is wrong moves them, and says nothing."""
    keys = [(name, "[u32]" if isinstance(value, list) else "u32", value) for name, value in told.items()]
    start = [("general.architecture", "string", "llama"), ("llama.block_count", "u32", 1)]
    path, name = tmp_path / "x.gguf", "blk.0.attn_q.weight"
    values = np.arange(8, dtype="<f4")
    path.write_bytes(header_bytes([*start, *keys], [(name, (8, 1), FORMATS["f32"])]) + values.tobytes())
    if isinstance(expected, str):
        with pytest.raises(FileFormatError, match=f"{re.escape(expected)}.*; the file is damaged"):
            smolexport_to_gguf.weights(path)
        assert f"no weights fingerprint: {path}: " in call("inspect", path).err
    else:
        [stored] = smolexport_to_gguf.weights(path).values()
        heads = values.reshape(-1, expected // 2, 2)  # pairs beside each other; the checkpoint has halves
        np.testing.assert_array_equal(stored.read_rows().ravel(), heads.transpose(0, 2, 1).ravel())


def test_an_odd_head_where_no_row_moves(tmp_path: Path) -> None:
    start = [("general.architecture", "string", "qwen2"), ("qwen2.block_count", "u32", 1)]
    path, values = tmp_path / "x.gguf", np.arange(6, dtype="<f4")
    odd = [*start, ("qwen2.attention.key_length", "u32", 3)]
    path.write_bytes(header_bytes(odd, [("blk.0.attn_q.weight", (6, 1), FORMATS["f32"])]) + values.tobytes())
    [stored] = smolexport_to_gguf.weights(path).values()
    np.testing.assert_array_equal(stored.read_rows().ravel(), values)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([], "general.architecture is missing"),
        ([("general.architecture", "[u32]", [1])], "general.architecture is missing or not text"),
        ([("general.architecture", "string", "gpt5")], "unknown architecture 'gpt5'; known: llama, smollm3"),
        ([("general.architecture", "string", "qwen2")], "qwen2.block_count is missing or not an integer"),
        ([("general.architecture", "string", "qwen2"), ("qwen2.block_count", "bool", True)], "not an integer"),
        ([("general.architecture", "string", "qwen2"), ("qwen2.block_count", "[u32]", [1, 2])], "not an integer"),
        ([("general.architecture", "string", "qwen2"), ("qwen2.block_count", "i32", -1)], "block_count is -1"),
        ([("general.architecture", "string", "qwen2"), ("qwen2.block_count", "u32", 9999)], "block_count is 9999"),
    ],
)
def test_weights_of_a_file_that_does_not_say_what_it_is(
    keys: list[tuple[str, str, object]], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header_bytes(keys, []) + bytes(32))
    with pytest.raises(FileFormatError, match=re.escape(said)):
        smolexport_to_gguf.weights(path)


def test_lint_names_what_llama_cpp_refuses(tmp_path: Path) -> None:
    path, f32, llama = tmp_path / "x.gguf", FORMATS["f32"], ("general.architecture", "string", "llama")
    tokens = ("tokenizer.ggml.tokens", "[string]", ["a", "b"])

    def findings(keys: list[tuple[str, str, object]], name: str = "token_embd.weight") -> list[str]:
        path.write_bytes(header_bytes(keys, [(name, (3, 1), f32)]) + bytes(32))
        return smolexport_to_gguf.lint(path)

    assert findings([llama]) == []
    assert findings([llama], "n" * 63) == []
    assert findings([llama, tokens], "output.weight") == []
    assert findings([llama, tokens, ("tokenizer.ggml.model", "string", "none")]) == []
    [long] = findings([llama], "n" * 64)
    assert "nnn has more than 63 bytes" in long
    [unequal] = findings([llama, tokens])
    assert unequal == "tokenizer.ggml.tokens holds 2 tokens, token_embd.weight has 3 rows; llama.cpp refuses that"
    assert f"note: {unequal}\n" in call("inspect", path).err
    path.write_bytes(b"GGUF")
    with pytest.raises(FileFormatError, match="is not a GGUF file"):
        smolexport_to_gguf.lint(path)


def test_llama_cpp_refuses_what_lint_names(tmp_path: Path) -> None:
    """The linter's claims, put to the library; and a sound file has none."""
    pytest.importorskip("llama_cpp")
    from smolexport.errors import SmolexportError
    from smolexport_on_llamacpp import open as play
    from tests.cli.commands import tiny_checkpoint

    sound = tmp_path / "sound.gguf"
    assert call("gguf", tiny_checkpoint(tmp_path), "-q", "f16", "-o", sound).code == 0
    assert smolexport_to_gguf.lint(sound) == []
    found = read_gguf(sound)
    rows = [(t.name, t.shape, t.format) for t in found.tensors.values()]
    data = sound.read_bytes()[min(t.offset for t in found.tensors.values()) :]
    kinds = [(name, kind, value) for name, (kind, value) in found.metadata.items()]
    fewer = [(n, k, v[:-1] if n.startswith("tokenizer.ggml.tok") and k[0] == "[" else v) for n, k, v in kinds]
    nameless = [(n, k, v) for n, k, v in kinds if n != "general.architecture"]
    renamed = [(name if number else name + "n" * 64, shape, form) for number, (name, shape, form) in enumerate(rows)]
    for metadata, tensors, findings in ((kinds, rows, 0), (fewer, rows, 1), (nameless, rows, 1), (kinds, renamed, 1)):
        path = tmp_path / "x.gguf"
        path.write_bytes(header_bytes(metadata, tensors) + data)
        assert len(smolexport_to_gguf.lint(path)) == findings
        if findings:
            with pytest.raises(SmolexportError):
                play(path, threads=1)
        else:
            play(path, threads=1).close()

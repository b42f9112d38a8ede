"""Files of some megabytes that promise work for hours: refused at once, and what is legal and large is read quickly."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import smolexport
from smolexport.errors import SmolexportError
from smolexport.quant import FORMATS
from smolexport_to_gguf.container import header_bytes, read_gguf
from tests.cli.commands import assert_refused, call, tiny_checkpoint
from tests.clocks import at_most
from tests.runtimes.onnx_edits import field

U8, BOOL, STRING, ARRAY = 0, 7, 8, 9
SECONDS = 60  # on a slow machine with others at work; a hang takes far longer


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def gguf(path: Path, keys: bytes, count: int, tensors: bytes = b"", tensor_count: int = 0) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count) + keys + tensors
    path.write_bytes(head + bytes(-len(head) % 32 + 64))
    return path


def array(name: bytes, item: int, count: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<IIQ", ARRAY, item, count) + content


def many_keys(path: Path) -> Path:
    count = 2_000_000
    rows = np.zeros(count, [("length", "<u8"), ("name", "S8"), ("kind", "<u4"), ("value", "u1")])
    rows["length"], rows["kind"], rows["name"] = 8, U8, np.char.zfill(np.arange(count).astype("S8"), 8)
    return gguf(path, rows.tobytes(), count)


def many_tensors(path: Path) -> Path:
    info = text(b"%08d") + struct.pack("<IQIQ", 1, 4, 0, 0)
    return gguf(path, b"", 0, b"".join(info % n for n in range(200_000)), 200_000)


COSTLY: dict[str, tuple[Callable[[Path], Path], str]] = {
    "5 million empty strings": (lambda p: gguf(p, array(b"k", STRING, 5_000_000, bytes(40_000_000)), 1), "5,000,000"),
    "60 million truth values": (lambda p: gguf(p, array(b"k", BOOL, 60_000_000, bytes(60_000_000)), 1), "60,000,000"),
    "2 million keys": (many_keys, "2,000,000 keys"),
    "200,000 tensors": (many_tensors, "200,000 tensors"),
}


@pytest.mark.parametrize("cost", COSTLY)
def test_costly_gguf_files(cost: str, tmp_path: Path) -> None:
    make, said = COSTLY[cost]
    path = make(tmp_path / "x.gguf")
    for wish in (("inspect", path), ("inspect", "--json", path)):
        with at_most(SECONDS):
            assert_refused(call(*wish), path, said)


def test_tensors_with_long_names_in_a_table(tmp_path: Path) -> None:
    """Every row as wide as the widest name would be gigabytes."""
    names = [b"t" * 60_000, *(b"t%d" % n for n in range(30_000))]
    infos = (text(name) + struct.pack("<IQIQ", 1, 8, 0, 32 * place) for place, name in enumerate(names))
    path = gguf(tmp_path / "x.gguf", b"", 0, b"".join(infos), len(names))
    with path.open("ab") as file:
        file.write(bytes(32 * len(names)))
    with at_most(SECONDS):
        outcome = call("inspect", path)
    assert outcome.code == 0
    assert max(map(len, outcome.out.splitlines())) < 250


def test_the_largest_vocabulary_that_there_is(tmp_path: Path) -> None:
    """Of 262,144 tokens with 600,000 merges."""
    tokens, merges = 262_144, 600_000
    metadata = [
        ("tokenizer.ggml.tokens", "[string]", [f"token{n}é" for n in range(tokens)]),
        ("tokenizer.ggml.scores", "[f32]", np.arange(tokens, dtype=np.float32)),
        ("tokenizer.ggml.token_type", "[i32]", np.ones(tokens, np.int32)),
        ("tokenizer.ggml.merges", "[string]", [f"a{n} b" for n in range(merges)]),
    ]
    path = tmp_path / "x.gguf"
    path.write_bytes(header_bytes(metadata, [("token_embd.weight", (1, 32), FORMATS["f32"])]) + bytes(128))
    with at_most(SECONDS):
        found = read_gguf(path).get("tokenizer.ggml.tokens")
        shown = json.loads(call("inspect", "--json", path).out)["metadata"]
    assert found == metadata[0][2] == shown["tokenizer.ggml.tokens"]
    assert shown["tokenizer.ggml.merges"] == metadata[3][2]
    assert shown["tokenizer.ggml.scores"][-1] == tokens - 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folders")
    for target in ("mlx", "onnx"):
        assert call(target, tiny_checkpoint(out), "-q", "int4", "-o", out / target).code == 0
    return out


def test_a_header_of_a_million_arrays(folders: Path) -> None:
    """Of MLX: legal safetensors, 60 MB of names."""
    entry = '"a%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = '{"__metadata__":{"format":"mlx"},' + ",".join(entry % n for n in range(1_000_000)) + "}"
    raw = text.encode() + b" " * (-len(text) % 8)
    path = folders / "mlx" / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    for wish in (("inspect", path.parent), ("inspect", "--json", path.parent)):
        with at_most(SECONDS):
            assert_refused(call(*wish), path.parent)
    with at_most(SECONDS), pytest.raises(SmolexportError):
        smolexport.inspect(path.parent)


def test_a_graph_of_many_small_fields(folders: Path) -> None:
    """Of ONNX: 20 million fields, spread over messages in messages."""
    node = field(1, field(5, b"\x32\x00" * 1000) * 50)
    (folders / "onnx" / "onnx" / "model_q4.onnx").write_bytes(field(7, node * 400))
    for wish in (("inspect", folders / "onnx"), ("inspect", "--json", folders / "onnx")):
        with at_most(SECONDS):
            assert_refused(call(*wish), "more than 1,048,576 fields")

"""Safetensors files from strangers: each fault is one line with the file or the tensor, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolexport.errors import SmolexportError
from smolexport.model.checkpoint import open_checkpoint
from smolexport.model.tensor_file import StoredTensor
from tests.cli.commands import assert_refused, call, tiny_checkpoint
from tests.damage import join, poke, split

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sharded"), shards=3)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "checkpoint"))


def refuse(folder: Path, *words: str | Path, scheme: str = "f16", planned: bool = False) -> None:
    """The export of `folder` ends in one line with `words` and leaves nothing."""
    target = folder.parent / "out"
    target.mkdir(exist_ok=True)
    assert_refused(call("gguf", folder, "-q", scheme, "-o", target / "x.gguf"), *words, planned=planned)
    assert list(target.iterdir()) == []


def reheader(change: Callable[[dict[str, Any]], object], extra: int = 0) -> Damage:
    """Damage that rewrites the header and appends `extra` bytes of data."""

    def damage(path: Path) -> None:
        header, data = split(path)
        change(header)
        join(path, header, data + bytes(extra))

    return damage


def relength(length: Callable[[int], int]) -> Damage:
    """Damage that writes another header length, computed from the file's size."""
    return lambda path: join(path, *split(path), length=length(path.stat().st_size))


def cut(size: int) -> Damage:
    """Damage that truncates the file to `size` bytes, or by it when negative."""
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def move(name: str, by: int) -> Damage:
    def change(header: dict[str, Any]) -> None:
        header[name]["data_offsets"] = [o + by for o in header[name]["data_offsets"]]

    return reheader(change)


FILES: dict[str, Damage] = {
    "empty": cut(0),
    "half a length": cut(5),
    "a length only": cut(8),
    "header cut": cut(300),
    "data cut": cut(-1),
    "data far too short": cut(-60_000),
    "one byte too many": reheader(lambda header: None, extra=1),
    "length 2^63": relength(lambda size: 2**63),
    "length 2^64 - 1": relength(lambda size: 2**64 - 1),
    "length beyond the file": relength(lambda size: size + 1),
    "length 200 MB": relength(lambda size: 200_000_000),
    "length zero": relength(lambda size: 0),
    "header of noise": lambda path: join(path, b"\xff\x00 nonsense", b""),
    "header no object": lambda path: join(path, [1, 2], b""),
    "header deeply nested": lambda path: join(path, b'{"a":' * 5000, b""),
    "overlap": move(UP, -2),
    "gap": reheader(lambda h: h.pop(UP)),
    "beyond the end": reheader(lambda h: h[UP].update(data_offsets=[10**12, 10**12 + 20480])),
    "end before start": reheader(lambda h: h[UP].update(data_offsets=h[UP]["data_offsets"][::-1])),
    "negative offset": reheader(lambda h: h[UP].update(data_offsets=[-2, 5])),
    "shape of another size": reheader(lambda h: h[UP].update(shape=[160, 65])),
    "shape of 2^80 elements": reheader(lambda h: h[UP].update(shape=[2**40, 2**40])),
    "no dtype": reheader(lambda h: h[UP].pop("dtype")),
    "unknown dtype": reheader(lambda h: h[UP].update(dtype="Q4_K")),
}


@pytest.mark.parametrize("fault", FILES)
def test_damaged_file(fault: str, folder: Path) -> None:
    FILES[fault](folder / SINGLE)
    refuse(folder, folder / SINGLE, "is damaged or not a safetensors file")


@pytest.mark.parametrize(("dtype", "bytes_each"), [("I8", 1), ("F64", 8), ("F8_E4M3", 1), ("I64", 8), ("BOOL", 1)])
def test_wrong_dtype(dtype: str, bytes_each: int, folder: Path) -> None:
    header, data = split(folder / SINGLE)
    end = len(data)
    header["model.extra.weight"] = {"dtype": dtype, "shape": [4], "data_offsets": [end, end + 4 * bytes_each]}
    join(folder / SINGLE, header, data + bytes(4 * bytes_each))
    refuse(folder, folder / SINGLE, "model.extra.weight", dtype)


def without(name: str, header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """The file's parts without one tensor; the rest moves up."""
    start, end = header.pop(name)["data_offsets"]
    for entry in (e for key, e in header.items() if key != "__metadata__"):
        entry["data_offsets"] = [o - (end - start) if o >= end else o for o in entry["data_offsets"]]
    return header, data[:start] + data[end:]


def add(path: Path, name: str, like: str) -> None:
    """Add a copy of the tensor `like` under another name."""
    header, data = split(path)
    start, end = header[like]["data_offsets"]
    header[name] = {**header[like], "data_offsets": [len(data), len(data) + end - start]}
    join(path, header, data + data[start:end])


def test_missing_tensor(folder: Path) -> None:
    join(folder / SINGLE, *without(UP, *split(folder / SINGLE)))
    refuse(folder, folder, UP, "is missing")


def test_unexpected_tensor_is_shown_without_control_characters(folder: Path) -> None:
    add(folder / SINGLE, "model.evil\x1b[2J\nsecond line", UP)
    refuse(folder, folder / SINGLE, r"model.evil\x1b[2J\nsecond line", "not part of a llama model")


def test_misshaped_tensor(folder: Path) -> None:
    reheader(lambda h: h[UP].update(shape=[64, 160]))(folder / SINGLE)
    refuse(folder, folder / SINGLE, UP, "[64, 160]", "[160, 64]")


@pytest.mark.parametrize("shape", [[10240], [160, 64, 1], [1, 160, 64]])
def test_other_rank(shape: list[int], folder: Path) -> None:
    reheader(lambda h: h[UP].update(shape=shape))(folder / SINGLE)
    refuse(folder, UP, str(shape))


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        (UP, (3, 5)),
        ("model.norm.weight", (7,)),
        ("model.layers.0.self_attn.q_proj.weight", (21, 2)),
        ("model.layers.0.self_attn.k_proj.bias", (9,)),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(
    dtype: str, name: str, place: tuple[int, ...], value: float, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path, dtype=dtype, attention_bias=True, num_hidden_layers=2)
    poke(folder / SINGLE, name, place, value)
    refuse(folder, folder / SINGLE, name, f"{value} at {list(place)}", planned=True)


@pytest.mark.parametrize(
    ("scheme", "value"),
    [("f16", 1e6), ("f16", -65520), ("q4_0", 1e9), ("q8_0", -1e9), ("q4_k", 1e9), ("bf16", 3.4028e38)],
)
def test_weights_that_the_format_cannot_hold(scheme: str, value: float, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    folder = tiny_checkpoint(tmp_path, dtype="f32", **wide)
    name = "model.layers.0.self_attn.q_proj.weight"
    poke(folder / SINGLE, name, (33, 4), value)
    refuse(folder, folder / SINGLE, name, "[33, 4]", "cannot hold", scheme=scheme, planned=True)
    assert call("gguf", folder, "-q", "f32", "-o", tmp_path / "f32.gguf").code == 0


@pytest.mark.parametrize("shape", [[], [20480], [320, 64, 1], [1, 20480], [64, 320]])
def test_tied_head_and_embedding_of_another_shape(
    shape: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both alike, so that only the config can tell; refused without reading either."""
    path = folder / SINGLE
    if not shape:
        header, data = without(EMBED, *split(path))
        header[EMBED] = {"dtype": "BF16", "shape": [], "data_offsets": [len(data), len(data) + 2]}
        join(path, header, data + bytes(2))
    add(path, "lm_head.weight", EMBED)
    reheader(lambda h: [h[name].update(shape=shape) for name in (EMBED, "lm_head.weight")])(path)
    monkeypatch.setattr(StoredTensor, "read_rows", lambda *_: pytest.fail("was read"))
    refuse(folder, path, EMBED, f"has shape {shape}, config.json asks for [320, 64]")


@pytest.mark.parametrize("shape", [[], [20480], [1, 20480]])
def test_tied_head_of_another_shape(shape: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / SINGLE
    add(path, "lm_head.weight", EMBED if shape else "model.norm.weight")
    if not shape:
        header, data = split(path)
        start = header["lm_head.weight"]["data_offsets"][0]
        header["lm_head.weight"]["data_offsets"] = [start, start + 2]
        join(path, header, data[: start + 2])
    reheader(lambda h: h["lm_head.weight"].update(shape=shape))(path)
    monkeypatch.setattr(StoredTensor, "read_rows", lambda *_: pytest.fail("was read"))
    refuse(folder, path, "lm_head.weight", f"has shape {shape}, config.json asks for [320, 64]")


def test_only_a_pickle(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    refuse(folder, folder, "pytorch_model.bin is a pickle", "safetensors")


def test_no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    refuse(folder, folder, "neither model.safetensors nor")


def test_weights_that_are_a_folder(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()
    refuse(folder, folder / SINGLE, "is not a regular file")


def index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "evil.bin", "..", ""])
def test_index_that_leaves_the_folder(name: str, shards: Path) -> None:
    (shards.parent / "evil.safetensors").write_bytes(b"")
    index(shards, lambda c: c["weight_map"].update({UP: name}))
    refuse(shards, shards / INDEX, repr(name))


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, "model.safetensors", {UP: 3}, {UP: None}, {UP: ["model.safetensors"]}]
)
def test_index_without_a_map(weight_map: object, shards: Path) -> None:
    index(shards, lambda c: c.update(weight_map=weight_map))
    refuse(shards, shards / INDEX, "weight_map must map tensor names to file names")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_index_that_is_no_json(content: bytes, shards: Path) -> None:
    (shards / INDEX).write_bytes(content)
    refuse(shards, shards / INDEX)


def test_missing_shard(shards: Path) -> None:
    lost = shards / "model-00002-of-00003.safetensors"
    lost.unlink()
    refuse(shards, lost, "the download is incomplete")


def test_tensor_in_two_shards(shards: Path) -> None:
    first, second = (shards / f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
    header, data = split(second)
    start, end = split(first)[0][EMBED]["data_offsets"]
    header[EMBED] = {"dtype": "BF16", "shape": [320, 64], "data_offsets": [len(data), len(data) + end - start]}
    join(second, header, data + bytes(end - start))
    refuse(shards, second, EMBED, "is in model-00001-of-00003.safetensors too")


def test_random_bytes_in_the_header(folder: Path) -> None:
    """Whatever a header says, it is read or refused; 150 seeded changes of one to three bytes."""
    path = folder / SINGLE
    raw, random = bytearray(path.read_bytes()), np.random.default_rng(5)
    length = int.from_bytes(raw[:8], "little")
    read = []
    for _ in range(150):
        changed = bytearray(raw)
        for _ in range(random.integers(1, 4)):
            changed[random.integers(0, 8 + length)] = random.integers(0, 256)
        path.write_bytes(changed)
        with suppress(SmolexportError):
            read.append(open_checkpoint(folder))
    assert len(read) < 50

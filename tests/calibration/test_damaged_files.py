"""Texts and statistics damaged at random: they are read, or refused in one short line that names the file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from smolexport.calibration import collect
from smolexport.calibration.statistics import Input, Statistics, file_of, open_statistics, read_manifest
from smolexport.calibration.texts import read_source
from smolexport.errors import CalibrationError, UsageError
from smolexport.model.checkpoint import Checkpoint, open_checkpoint
from smolexport.run.chat import Answer
from smolexport.tokenizer import FileTokenizer, open_tokenizer, read_tokenizer
from tests.calibration.models import ids_file
from tests.cli.commands import assert_refused, call, tiny_checkpoint
from tests.damage import join, split
from tests.mutations import NASTY, changed_bytes, changed_json, read_or_refused

TRIES = 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=1))


@pytest.fixture(scope="module")
def codec(checkpoint: Checkpoint) -> FileTokenizer:
    return open_tokenizer(checkpoint.folder, read_tokenizer(checkpoint.folder, 320))


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("whole")
    job = collect.open_collection(checkpoint, folder / "stats", texts=[ids_file(folder, 300)], tokens=256, window=32)
    return collect.collect(job).folder


def text(path: Path, codec: FileTokenizer) -> Callable[[], object]:
    def render(asked: Any) -> Answer:
        return Answer("".join(str(m.get("content")) for m in asked["messages"]))

    return lambda: read_source(path, codec, limit=1 << 20, seed=0, vocab_size=320, render=render)


def header(descr: str = "'<i4'", order: str = "False", shape: str = "(12,)", version: int = 1) -> bytes:
    """A file of NumPy's with any header, and room for twelve numbers behind it."""
    line = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(line))
    return b"\x93NUMPY" + bytes([version, 0]) + length + line + np.arange(12, dtype="<i4").tobytes()


DESCR = ("'<i4'", "'|O'", "'<f4'", "'>i2'", "'<u8'", "'|b1'", "'<U3'", "'V99999999999'", "[('a', '<i4')]", "('<i4', (2,))", "',,'", "'i' * 9", "3", "None", "1if", "'''", "[('a',)]", "'<i4", "'M8[s]'", "{}")  # noqa: E501  # fmt: skip
SHAPE = ("(12,)", "(3, 4)", "(4, 3)", "12", "(2**63, 2)", "(9223372036854775807, 2)", "(4611686018427387904, 4)", "(-1,)", "(-2, -6)", "(0,)", "()", "(9223372036854775808, 0)", "(True, 2)", "(1e400,)", "(12.0,)", "('a',)", "(1" + "0" * 5000 + ",)", "(" * 200 + ")" * 200, "(" * 9, "(1" + ",1" * 100 + ")", "(12L,)", "(0x0c,)", "(1_2,)", "\n(12,)")  # noqa: E501  # fmt: skip
ORDER = ("False", "True", "None", "0", "x", "(")


def test_arrays(codec: FileTokenizer, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """What NumPy's own reader lets pass or raises: TokenError, SyntaxError, TypeError, KeyError, OverflowError …"""
    path, random = tmp_path / "x.npy", Random(0)
    files = [header(d, version=v) for d in DESCR for v in (1, 2, 3, 9)]
    files += [header(shape=s, order=o) for s in SHAPE for o in ORDER[:3]] + [header(order=o) for o in ORDER]
    files += [
        changed_bytes(random, header(random.choice(DESCR[:5]), shape=random.choice(SHAPE[:3]))) for _ in range(TRIES)
    ]
    refused = 0
    for data in files:
        path.write_bytes(data)
        refused += read_or_refused(text(path, codec), path)
    assert len(files) * 0.5 < refused < len(files)
    assert not recwarn.list
    path.write_bytes(header(shape="(3, 4)", order="True"))
    assert read_source(path, codec, limit=9, seed=0, vocab_size=320, render=lambda _: Answer())[1].tolist() == (
        np.load(path).reshape(-1).tolist()
    )


def test_lists_of_ids(codec: FileTokenizer, tmp_path: Path) -> None:
    path, random = tmp_path / "x.json", Random(1)
    files = [n.encode() for n in NASTY] + [f"[{n}]".encode() for n in NASTY] + [f"[1, {n}, 2]".encode() for n in NASTY]
    files += [f"[[1, 2], [3, {n}]]".encode() for n in NASTY]
    files += [changed_json(random, random.choice(([1, 2, 3], [[1, 2], [3, 4]]))) for _ in range(TRIES)]
    for data in files:
        path.write_bytes(data)
        read_or_refused(text(path, codec), path)
    for data in ("[true, 2]", "[1, false]", "[[true]]", "[1, 1.0]"):
        path.write_text(data)
        with pytest.raises(UsageError, match="must hold token ids"):
            text(path, codec)()


def test_lines(codec: FileTokenizer, tmp_path: Path) -> None:
    path, random = tmp_path / "x.jsonl", Random(2)
    talk = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"a": 1}], "chat_template_kwargs": {"b": True}}
    lines = (talk, {"text": "It's so"}, {**talk, "tools": json.dumps([{"a": 1}]), "enable_thinking": None})
    for _ in range(TRIES):
        path.write_bytes(b'{"text": "x"}\n' + changed_json(random, random.choice(lines)))
        read_or_refused(text(path, codec), path)


def test_what_is_no_regular_file(codec: FileTokenizer, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A pipe that nobody writes to is not waited for, neither as a text nor among the statistics."""
    pytest.importorskip("torch")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.npy").mkdir()
    for path in (tmp_path / "pipe.txt", tmp_path / "folder.npy", Path("/dev/zero"), Path("/dev/tty"), Path("/")):
        assert read_or_refused(text(path, codec), path)
        assert_refused(call("calibrate", checkpoint.folder, "--text", path, "-o", tmp_path / "s"), path)
    (tmp_path / "stats").mkdir()
    os.mkfifo(tmp_path / "stats" / "manifest.json")
    with pytest.raises(CalibrationError, match="is not a regular file"):
        open_statistics(tmp_path / "stats")


@pytest.mark.parametrize("name", ["layer-000.safetensors", "tokens.safetensors", "manifest.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_folder_among_statistics(
    name: str, make: Callable[[Path], None], whole: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "stats"))
    (folder / name).unlink()
    make(folder / name)
    assert read_or_refused(lambda: read_all(folder, checkpoint), folder / name)
    texts = [ids_file(tmp_path, 300)]
    again = lambda: collect.collect(collect.open_collection(checkpoint, folder, texts=texts, tokens=256, window=32))  # noqa: E731
    if not read_or_refused(again, folder / name):  # it took the place of a statistic, and was replaced by one
        read_all(folder, checkpoint)


def read_all(folder: Path, checkpoint: Checkpoint) -> None:
    found = open_statistics(folder, checkpoint)
    found.windows()
    for tensor in checkpoint.spec.tensors():
        if len(tensor.shape) == 2:
            found.hessian(tensor)
            found.mean_squares(tensor)
            found.largest_share(tensor)
    found.teacher()


def test_manifests(whole: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Whatever passes can be printed, and written as UTF-8."""
    facts = json.loads((whole / "manifest.json").read_bytes())
    path, random = tmp_path / "manifest.json", Random(3)
    files: list[Any] = []
    for nasty in NASTY:
        files += [{**facts, key: "?"} for key in facts]
        files += [{**facts, "sources": [{**facts["sources"][0], key: "?"}]} for key in facts["sources"][0]]
        files += [{**facts, "versions": {"torch": "?"}}, {**facts, "versions": {"?": "1"}}]
        files = [f if isinstance(f, bytes) else json.dumps(f).replace('"?"', nasty).encode() for f in files]
    files += [changed_json(random, facts) for _ in range(TRIES)]
    kept = 0
    for data in files:
        path.write_bytes(data)
        if not read_or_refused(lambda: read_manifest(tmp_path), path):
            found = read_manifest(tmp_path)
            assert str(found).isprintable()
            kept += 1
            read_or_refused(lambda found=found: Statistics(whole, found).windows(), whole / "tokens.safetensors")
    assert 0 < kept < len(files) / 2


def test_another_runs_manifest_is_told_of_briefly(whole: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "stats"))
    facts = json.loads((folder / "manifest.json").read_bytes())
    texts = [ids_file(tmp_path, 300)]
    source = {"name": "x" * 250, "sha256": "y" * 64, "tokens": 1}
    for change in (
        {"layers": 7}, {"kept": 3}, {"method": "z" * 300}, {"versions": {f"{i}" * 300: "v" * 300 for i in range(99)}},
        {"sources": [source] * 99},
    ):  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps({**facts, **change}))
        assert read_or_refused(
            lambda: collect.open_collection(checkpoint, folder, texts=texts, tokens=256, window=32), folder
        ), change


ARRAYS = ("layer-000.safetensors", "head.safetensors", "tokens.safetensors", "teacher.safetensors")


@pytest.mark.parametrize("name", ARRAYS)
def test_files_of_arrays(name: str, whole: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, random = Path(shutil.copytree(whole, tmp_path / "stats")), Random(4)
    path = folder / name
    head, data = split(path)
    refused = 0
    for number in range(TRIES):
        if number % 3:
            join(path, changed_json(random, head), data, random.choice((None, None, None, 2**63, 2**40, 0, 7)))
        else:  # near its start, where the header is
            raw = (whole / name).read_bytes()
            path.write_bytes(changed_bytes(random, raw[:1000]) + raw[1000:])
        refused += read_or_refused(lambda: read_all(folder, checkpoint), path)
    assert refused > TRIES / 2


def test_long_names_in_headers(whole: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "stats"))
    for name in ARRAYS:
        head, data = split(whole / name)
        for dtype in ("F16", "U8", "nothing"):
            entry = {"dtype": dtype, "shape": [0], "data_offsets": [len(data)] * 2}
            join(folder / name, {"\x1b[31m\n" + "x" * 100_000: entry, **head}, data)
            assert read_or_refused(lambda: read_all(folder, checkpoint), folder / name)
        shutil.copy(whole / name, folder / name)


def test_ids_beyond_the_vocabulary(whole: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """They would be looked up in an embedding that has no such row."""
    folder = Path(shutil.copytree(whole, tmp_path / "stats"))
    raw = bytearray((folder / "teacher.safetensors").read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start : start + 4] = (320).to_bytes(4, "little")
    (folder / "teacher.safetensors").write_bytes(raw)
    with pytest.raises(CalibrationError, match=r"teacher\.safetensors: holds ids outside the vocabulary of 320"):
        open_statistics(folder, checkpoint).teacher()
    facts = json.loads((folder / "manifest.json").read_bytes())
    windows = np.full((facts["windows"], facts["window"]), 999, np.int32)
    raw = bytearray((folder / "tokens.safetensors").read_bytes())
    raw[-windows.nbytes :] = windows.tobytes()
    (folder / "tokens.safetensors").write_bytes(raw)
    from smolexport.calibration.statistics import hash_of

    (folder / "manifest.json").write_text(json.dumps({**facts, "sha256": hash_of(windows)}))
    with pytest.raises(CalibrationError, match=r"tokens\.safetensors: holds ids outside the vocabulary of 320"):
        open_statistics(folder, checkpoint).windows()


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_names_of_texts_that_no_file_can_hold(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A file's name may be no UTF-8, or hold a line end; the records of an export are both."""
    pytest.importorskip("torch")
    path = tmp_path / os.fsdecode(b"a\xff\n.npy")
    try:
        path.write_bytes(ids_file(tmp_path, 300).read_bytes())
    except OSError as error:
        pytest.skip(errno.errorcode[error.errno or 0])
    job = collect.open_collection(checkpoint, tmp_path / "s", texts=[path], tokens=256, window=32)
    assert job.manifest.sources[0].name == read_manifest(tmp_path / "s").sources[0].name == "a??.npy"
    assert not (tmp_path / "s" / file_of(Input(0, "attn"))).exists()

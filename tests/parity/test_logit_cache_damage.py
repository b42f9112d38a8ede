"""Damage to the kept logits of a reference: never used, never a traceback; run again, and a note says so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

import numpy as np
import pytest

from smolexport.errors import FileFormatError
from smolexport.parity import reference as reference_module
from smolexport.parity.compare import compare
from smolexport.parity.inputs import Settings
from smolexport.parity.logit_cache import SUM, LogitCache, LogitStore, _sum, write_logits
from smolexport.parity.metrics import COLUMNS, Accumulator
from smolexport.parity.reference import run_reference
from tests.mutations import changed_bytes, changed_json, read_or_refused

MUTATIONS = 400
ONCE = Settings(window=64, max_windows=2, greedy_tokens=8, greedy_prompts=2, repetitions=0, memory=False)


def quiet(*_: object) -> None:
    """No progress."""


@pytest.fixture
def entry(make_model, text, tmp_path: Path) -> Path:
    with LogitCache(tmp_path / "cache") as cache:
        run_reference(make_model("r.table"), text, ONCE, cache, None, quiet)
    [found] = (tmp_path / "cache").iterdir()
    return found


def test_any_flipped_bit_is_seen(entry: Path, make_model, text) -> None:
    """In any file of an entry: the same figures come out, with a note, and the entry is as it was."""
    models, random = (make_model("r.table"), [make_model("a.table", noise=0.1)]), Random(1)
    cache = entry.parent
    first = compare(*models, text=text, settings=ONCE, cache=cache)
    assert not any("run again" in note for note in first.notes)
    whole = {file.name: file.read_bytes() for file in entry.iterdir()}
    assert set(whole) == {"logits.npy", "facts.json", SUM}
    for turn in range(40):
        name = sorted(whole)[turn % len(whole)]
        data = bytearray(whole[name])
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        (entry / name).write_bytes(data)
        again = compare(*models, text=text, settings=ONCE, cache=cache)
        assert again.candidates[0].accuracy == first.candidates[0].accuracy
        assert again.candidates[0].greedy == first.candidates[0].greedy
        [note] = [note for note in again.notes if "run again" in note]
        assert note == f"{entry}: the cached logits were damaged; the reference was run again"
        assert {file.name: file.read_bytes() for file in entry.iterdir()} == whole


@pytest.mark.parametrize("damage", ["no folder", "a folder inside", "a file more", "a file less", "empty", "a pipe"])
def test_entries_of_another_kind(damage: str, entry: Path, make_model, text) -> None:
    if damage in ("no folder", "empty"):
        for file in entry.iterdir():
            file.unlink()
    if damage == "no folder":
        entry.rmdir()
        entry.write_bytes(b"")
    if damage == "a folder inside":
        (entry / "x").mkdir()
    if damage == "a file more":
        (entry / "x").write_bytes(b"")
    if damage == "a file less":
        (entry / "logits.npy").unlink()
    if damage == "a pipe":
        (entry / "logits.npy").unlink()
        os.mkfifo(entry / "logits.npy")
    with LogitCache(entry.parent) as cache:
        played = run_reference(make_model("r.table"), text, ONCE, cache, None, quiet)
        assert len(cache.notes) == 1
    assert played.store.rows == 62
    assert sorted(file.name for file in entry.iterdir()) == [SUM, "facts.json", "logits.npy"]


def header(words: str) -> bytes:
    text = words.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


PLAIN = "{{'descr': '<f4', 'fortran_order': False, 'shape': {}, }}"
HEADERS = [
    header(PLAIN.format(shape))
    for shape in (
        "(9223372036854775808, 2)", "(18446744073709551616, 1)", "(0, 7)", "(3,)", "(3, 7, 1)", "(-3, -7)", "(3, 7L)",
        "()", "[3, 7]", "((3, 7), )", "(" * 50, "__import__('os')", "(3, 7", "(10**9, 7)", "(0x3, 7)", "(3.0, 7)",
    )
] + [
    header(PLAIN.replace("<f4", kind).format("(3, 7)")) for kind in ("<f8", "|O", ">f4", "<u2", "f4", "<M8[ns]", "\\x")
] + [
    header("{'descr': " * 12), header("{" * 100), header("\x00" * 100), header("'\\N{x}'"), header("(" * 117),
    b"\x93NUMPY\x02\x00" + header(PLAIN.format("(3, 7)"))[8:], b"PK\x03\x04" + bytes(124),
]  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_headers_that_are_not_ours(tmp_path: Path) -> None:
    path, random = tmp_path / "l.npy", Random(2)
    logits = np.arange(21, dtype=np.float32).reshape(3, 7)
    write_logits(path, 3, 7, [logits], bf16=False)
    whole = path.read_bytes()
    assert whole[:128] == header(PLAIN.format("(3, 7)")), "as NumPy writes it"
    assert (np.load(path) == logits).all()
    heads = [*HEADERS, *(changed_bytes(random, whole[:128]) for _ in range(MUTATIONS))]
    read = 0
    for head in heads:
        path.write_bytes(head + whole[128:])
        if not read_or_refused(lambda: LogitStore(path), path):
            store = LogitStore(path)
            read += 1
            assert store.rows * store.vocab_size in (21, 42)
            list(store.blocks(0, store.rows, 2))
    assert read < len(heads) / 4


def test_facts_with_any_part_changed_under_a_right_checksum(entry: Path, make_model, text) -> None:
    """As another program might leave them: taken when they can be true, else run again."""
    random, whole = Random(3), json.loads((entry / "facts.json").read_text())
    logits = (entry / "logits.npy").read_bytes()
    reference, again = make_model("r.table"), 0
    for _ in range(MUTATIONS // 2):
        (entry / "facts.json").write_bytes(changed_json(random, whole))
        (entry / "logits.npy").write_bytes(logits)
        (entry / SUM).write_text(_sum(entry))
        with LogitCache(entry.parent) as cache:
            played = run_reference(reference, text, ONCE, cache, None, quiet)
            again += len(cache.notes)
        for one in played.continuations:
            assert all(0 <= token < played.store.vocab_size for token in one.tokens)
            assert len(one.tokens) == len(one.margins) <= ONCE.greedy_tokens
    assert again > MUTATIONS / 4


def test_a_floor_of_another_kind(tmp_path: Path) -> None:
    path, random = tmp_path / "floor.f64", Random(4)
    path.write_bytes(np.arange(COLUMNS * 6, dtype="<f8").tobytes())
    whole = path.read_bytes()
    assert Accumulator.load(path).result().positions == 6
    for _ in range(MUTATIONS):
        path.write_bytes(changed_bytes(random, whole))
        read_or_refused(lambda: Accumulator.load(path).result(), path)
    path.unlink()
    with pytest.raises(FileFormatError):
        Accumulator.load(path)


def test_entries_of_earlier_versions_are_left_alone(entry: Path, make_model, text, monkeypatch) -> None:
    monkeypatch.setattr(reference_module, "FORM", 1)
    with LogitCache(entry.parent) as cache:
        run_reference(make_model("r.table"), text, ONCE, cache, None, quiet)
        assert not cache.notes
    assert len(list(entry.parent.iterdir())) == 2

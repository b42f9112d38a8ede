"""The reference's logits on disk, and a second comparison that need not play it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import smolexport_on_table as table

from smolexport.demo import demo_checkpoint, demo_text
from smolexport.errors import FileFormatError, OutputError, SessionError
from smolexport.parity import candidates, logit_cache
from smolexport.parity.compare import compare
from smolexport.parity.inputs import Settings
from smolexport.parity.logit_cache import LogitCache, LogitStore, digest, write_logits
from smolexport.parity.metrics import Accumulator
from tests.children import python
from tests.mutations import changed_bytes, read_or_refused

ONCE = Settings(window=64, repetitions=0, memory=False)


def write(path: Path, logits: np.ndarray, *, bf16: bool) -> LogitStore:
    write_logits(path, *logits.shape, np.array_split(logits, 3), bf16=bf16)
    return LogitStore(path)


def test_damaged_arrays_are_told_of(tmp_path: Path) -> None:
    """Whatever NumPy's parser makes of the piece of Python in their header."""
    path, random = tmp_path / "l.npy", Random(0)
    write(path, np.zeros((5, 7), np.float32), bf16=False)
    sound = path.read_bytes()
    files = [sound.replace(b"'<f4'", word.ljust(5)) for word in (b"',,'", b"('a'", b"'|O'", b"[],", b"1if")]
    for data in [*files, *(changed_bytes(random, sound) for _ in range(300))]:
        path.write_bytes(data)
        read_or_refused(lambda: LogitStore(path), path)
        read_or_refused(lambda: Accumulator.load(path), path)


@pytest.mark.parametrize("bf16", [True, False])
def test_logits_come_back_to_the_bit(tmp_path: Path, bf16: bool) -> None:
    logits = np.random.default_rng(0).standard_normal((11, 7), np.float32)
    if bf16:
        logits = (logits.view("<u4") >> 16 << 16).view("<f4")
    logits[3, 3] = np.inf
    stored = write(tmp_path / "l.npy", logits, bf16=bf16)
    assert (stored.rows, stored.vocab_size) == (11, 7)
    np.testing.assert_array_equal(np.concatenate(list(stored.blocks(0, 11, 4))), logits)
    parts = list(stored.blocks(2, 7, 3))
    assert [len(part) for part in parts] == [3, 2, 2]
    np.testing.assert_array_equal(np.concatenate(parts), logits[2:9])
    assert (tmp_path / "l.npy").stat().st_size < 200 + logits.size * (2 if bf16 else 4)


def test_what_is_no_bfloat16_is_not_cut(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="not bfloat16"):
        write_logits(tmp_path / "l.npy", 1, 2, [np.array([[1.0, 1.001]], np.float32)], bf16=True)


def test_damage_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "l.npy"
    stored = write(path, np.zeros((4, 5), np.float32), bf16=False)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(FileFormatError, match="is truncated"):
        list(stored.blocks(0, 4, 4))
    for content in (data[:-1], data[:5], b"", b"no array"):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"l\.npy"):
            LogitStore(path)
    with pytest.raises(OutputError):
        write_logits(path, 1 << 40, 1 << 20, [], bf16=False)


def test_a_second_comparison_does_not_play_the_reference(make_model, text, tmp_path: Path) -> None:
    reference, one, two = make_model("r.table"), make_model("a.table", noise=0.1), make_model("b.table", noise=0.2)
    first = compare(reference, [one], text=text, settings=ONCE, cache=tmp_path / "c")
    [entry] = (tmp_path / "c").iterdir()
    written = (entry / "logits.npy").stat().st_mtime_ns
    calls = []
    plain = table.TableSession.append

    def noted(self, tokens, **options):
        calls.append(self)
        return plain(self, tokens, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table.TableSession, "append", noted)
        again = compare(reference, [one, two], text=text, settings=ONCE, cache=tmp_path / "c")
    assert len({id(session) for session in calls}) == 2
    assert (entry / "logits.npy").stat().st_mtime_ns == written
    for result in (first, again):
        assert result.candidates[0].accuracy == first.candidates[0].accuracy
        assert result.candidates[0].greedy == first.candidates[0].greedy


@pytest.mark.parametrize("change", ["weights", "text", "window", "options", "version"])
def test_what_the_logits_depend_on_makes_another_entry(
    make_model, text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    candidate = make_model("a.table", noise=0.1)
    compare(make_model("r.table"), [candidate], text=text, settings=ONCE, cache=tmp_path / "c")
    settings, options = ONCE, {}
    if change == "weights":
        make_model("r.table", seed=8)
    elif change == "text":
        text = text[::-1]
    elif change == "window":
        settings = Settings(window=32, repetitions=0, memory=False)
    elif change == "options":
        options = {"scale": 0.5}
    else:
        monkeypatch.setattr(table, "version", lambda: "2")
    facts = {"seed": 8} if change == "weights" else {}
    reference = make_model("r.table", options=options, **facts)
    compare(reference, [candidate], text=text, settings=settings, cache=tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_a_damaged_entry_is_made_anew(make_model, text, tmp_path: Path) -> None:
    models = make_model("r.table"), [make_model("a.table", noise=0.1)]
    first = compare(*models, text=text, settings=ONCE, cache=tmp_path / "c")
    [entry] = (tmp_path / "c").iterdir()
    logits = (entry / "logits.npy").read_bytes()
    facts = [b"{", b"7", b"{}", b'{"greedy": 5}', b'{"greedy": []}', b'{"greedy": [{"tokens": ["1"], "margins": [1]}]}']
    other = tmp_path / "other.npy"
    write(other, np.zeros((3, 96), np.float32), bf16=False)
    damage = [("logits.npy", b"x"), ("logits.npy", other.read_bytes()), *(("facts.json", words) for words in facts)]
    for file, content in damage:
        (entry / file).write_bytes(content)
        again = compare(*models, text=text, settings=ONCE, cache=tmp_path / "c")
        assert again.candidates[0].accuracy == first.candidates[0].accuracy
        assert (entry / "logits.npy").read_bytes() == logits
    assert [path.name for path in (tmp_path / "c").iterdir()] == [entry.name]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"x"), Path.unlink], ids=["damaged", "lost"])
def test_a_noise_floor_that_is_not_there_is_measured_again(
    demo_files: list[Path], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    settings = Settings(window=16, max_windows=1, greedy_tokens=0, repetitions=0, threads=1, memory=False)

    def floor() -> float:
        played = compare(
            candidates.reference(demo_checkpoint()), candidates.exported(demo_files[:1]),
            text=demo_text(), settings=settings, cache=tmp_path / "c",
        )  # fmt: skip
        assert played.reference.noise_floor is not None
        return played.reference.noise_floor.kld.mean.value

    first = floor()
    [entry] = (tmp_path / "c").iterdir()
    damage(entry / "floor.f64")
    assert floor() == pytest.approx(first)


def test_the_oldest_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_cache, "ROOM", 800)
    cache = LogitCache(tmp_path)
    for number in range(4):
        with cache.making(f"k{number}") as (folder, _):
            write(folder / "logits.npy", np.zeros((4, 5), np.float32), bf16=False)
        cache.find("k0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k0", "k2", "k3"]


def test_nothing_is_left_of_an_entry_that_fails(tmp_path: Path) -> None:
    making = LogitCache(tmp_path).making("k")
    (making.__enter__()[0] / "logits.npy").write_bytes(b"x")
    assert list(tmp_path.iterdir())
    assert not making.__exit__(RuntimeError, RuntimeError(), None)
    assert not list(tmp_path.iterdir())


def test_the_cache_goes_where_the_hubs_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path))
    said = python("from smolexport.parity.logit_cache import usual_folder; print(usual_folder())")
    assert tmp_path in Path(said.strip()).parents


def test_a_digest_reads_a_file_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, with the same size and the date set back, too; one that was just written is read each time."""
    file, ago = tmp_path / "model.safetensors", time.time() - 1000
    file.write_bytes(b"abcd")
    os.utime(file, (ago, ago))
    read = list[Path]()
    plain = logit_cache.hashlib.file_digest
    monkeypatch.setattr(logit_cache.hashlib, "file_digest", lambda f, kind: read.append(Path(f.name)) or plain(f, kind))

    def mark() -> str:
        return digest(tmp_path, {"a": 1}, [])

    assert mark() == mark()
    assert read == [file, file], "a second write could leave it the same date"
    monkeypatch.setattr(logit_cache, "SETTLED", -1)
    first = mark()
    assert first == mark()
    assert len(read) == 3
    time.sleep(0.05)  # the clock of a file system ticks
    with file.open("r+b") as opened:
        opened.write(b"x")
    os.utime(file, (ago, ago))
    assert mark() != first
    assert len(read) == 4
    assert digest(tmp_path, {"a": 2}, []) != digest(tmp_path, {"a": 1}, []) != digest(file, {"a": 2}, [])

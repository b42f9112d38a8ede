"""Folders appear whole or not at all; what stands in their place is kept until the new one is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolexport.conversion.plan import ByteRange, Entry, OutputFile, Plan
from smolexport.conversion.writer import Sink, open_output
from smolexport.errors import CheckpointError, OutputError
from smolexport.files import atomic_folder, check_parent, check_target, leftovers, made_folder, refuse_own_source
from smolexport.quant import FORMATS


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def fill(path: Path, *, force: bool = False, fail: BaseException | None = None) -> None:
    with atomic_folder(path, replaceable=(lambda _: True) if force else None) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("new")
        assert not (path / "inner").exists()
        if fail:
            raise fail


def test_appears_at_the_end_with_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        fill(tmp_path / "x")
    finally:
        os.umask(before)
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x" / "inner" / "a").read_text() == "new"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit(), MemoryError()])
def test_nothing_stays_after_an_error(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        fill(tmp_path / "x", fail=error)
    assert names(tmp_path) == []


def test_an_earlier_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("old")
    with pytest.raises(OutputError, match="appeared while it was being written"):
        fill(tmp_path / "x")
    assert names(tmp_path / "x") == ["old"]
    fill(tmp_path / "x", force=True)
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["inner"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_earlier_folder_stays_when_the_new_one_fails(
    moment: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it fails, or somebody presses Ctrl-C, between the two renamings."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "x" and moment == "after":
            rename(self, target)
            raise error
        if self.suffix == ".partial":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        fill(tmp_path / "x", force=True)
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x" / "old").read_text() == "old"


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    """Minutes lie between the first look and the renaming: `replaceable` is asked again, links are never followed."""
    (tmp_path / "elsewhere").mkdir()

    def late(what: str) -> None:
        with atomic_folder(tmp_path / what, replaceable=lambda path: not (path / "thesis").exists()):
            if what == "link":
                (tmp_path / what).symlink_to("elsewhere")
            else:
                (tmp_path / what).mkdir()
                (tmp_path / what / "thesis").write_text("precious")

    for what in ("folder", "link"):
        with pytest.raises(OutputError):
            late(what)
    assert names(tmp_path) == ["elsewhere", "folder", "link"]
    assert (tmp_path / "folder" / "thesis").read_text() == "precious"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    fill(tmp_path / "x")
    assert names(tmp_path / "x") == ["inner"]


def test_no_place_for_it(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nothing was written"):
        fill(tmp_path / "missing" / "x")


def test_leftovers_are_judged_by_the_last_write_inside(tmp_path: Path) -> None:
    left = tmp_path / ".x.abcdefgh.partial"
    left.mkdir()
    (left / "file").write_text("half")
    old = left.stat().st_mtime - 3600
    os.utime(left, (old, old))
    assert leftovers(tmp_path / "x") == []
    os.utime(left / "file", (old, old))
    assert leftovers(tmp_path / "x") == [f"{left} is left from an export that was killed; it can be deleted"]
    assert leftovers(tmp_path / "y") == []
    aside = left.rename(left.with_suffix(".replaced"))
    assert leftovers(tmp_path / "x") == [
        f"{aside} is an earlier output that an export had set aside when it was killed; rename or delete it"
    ]


def test_what_is_read_from_or_stood_in_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a" / "checkpoint"
    source.mkdir(parents=True)
    (source / "model.safetensors").write_text("weights")
    (source / "x.gguf").write_text("ours")
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path / "here")
    for target, said in (
        (source, "checkpoint"), (tmp_path / "a", "checkpoint"), (tmp_path / "link", "checkpoint"),
        (Path(), "working folder"), (Path(".."), "checkpoint"), (tmp_path / "here", "working folder"),
    ):  # fmt: skip
        with pytest.raises(OutputError, match=f"is or contains the {said}"):
            refuse_own_source(target, source, folder=True, ours=lambda _: True)
    refuse_own_source(source / "out", source, folder=True, ours=lambda _: True)

    def ours(path: Path) -> bool:
        return path.suffix == ".gguf"

    with pytest.raises(OutputError, match="is a file of the checkpoint itself"):
        refuse_own_source(source / "model.safetensors", source, folder=False, ours=ours)
    for fine in (source / "x.gguf", source / "new.gguf", tmp_path / "model.safetensors"):
        refuse_own_source(fine, source, folder=False, ours=ours)


def test_parents(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_parent(tmp_path)
    check_parent(tmp_path / "new")
    for path, said in (("file", "is not a folder"), ("no/such", "no such folder"), ("x" * 300, "too long")):
        with pytest.raises(OutputError, match=said):
            check_parent(tmp_path / path)


def test_targets(tmp_path: Path) -> None:
    """Only what `replaceable` recognises is replaced; links and files never."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("file", "link", "dangling"):
        with pytest.raises(OutputError, match="is not a folder"):
            check_target(tmp_path / name, 1, force=True, replaceable=lambda _: True)
    with pytest.raises(OutputError, match="never replaced"):
        check_target(tmp_path / "folder", 1, force=True, replaceable=lambda _: False)
    with pytest.raises(OutputError, match="pass --force"):
        check_target(tmp_path / "folder", 1, replaceable=lambda _: True)
    check_target(tmp_path / "folder", 1, force=True, replaceable=lambda _: True)
    check_target(tmp_path / "new", 1, replaceable=lambda _: False)


def fail_in(folder: Path, leaving: str = "") -> None:
    with made_folder(folder):
        if leaving:
            (folder / leaving).write_text("precious")
        raise ValueError("stop")


def test_a_folder_for_outputs_goes_again_when_they_fail(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"):
        fail_in(tmp_path / "out")
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="stop"):
        fail_in(tmp_path / "out", "mine")
    assert names(tmp_path / "out") == ["mine"]
    with made_folder(tmp_path / "out"), pytest.raises(OutputError, match="out2/x: No such file"):
        made_folder(tmp_path / "out2" / "x").__enter__()


def planned(copied: Path) -> Plan:
    """Two files with rows of one entry, one of them with a table behind its padding; a made and a copied file."""
    files = (
        OutputFile("a", b"HEAD", (ByteRange("w", 6, 4),), 24, ((16, lambda: iter([np.arange(8, dtype=np.uint8)])),)),
        OutputFile("inner/b", b"", (ByteRange("w", 0, 4, first=4),), 8),
        OutputFile("made.json", b"{}\n"),
        OutputFile("inner/copied", copied, size=5),
    )
    return Plan("x", "y", "z", (Entry("w", FORMATS["f32"], (2, 2)),), files=files)


def test_a_plan_becomes_its_files(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"12345")
    plan, rows = planned(tmp_path / "source"), np.arange(16, dtype=np.uint8).reshape(2, 8)
    with open_output(plan, tmp_path / "out", replaceable=lambda _: True) as sink:
        sink.put("w", 1, rows[1:])
        sink.put("w", 0, rows[:1])
        assert not (tmp_path / "out").exists()
    written = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in sink.paths}
    assert written == {
        "a": b"HEAD\0\0" + rows[:, :4].tobytes() + bytes(2) + bytes(range(8)), "inner/b": rows[:, 4:].tobytes(),
        "made.json": b"{}\n", "inner/copied": b"12345",
    }  # fmt: skip
    assert plan.size == sum(map(len, written.values()))


def test_a_copied_file_that_vanished(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"source: No such file .*; it existed when the export began"),
        open_output(planned(tmp_path / "source"), tmp_path / "out", replaceable=lambda _: True),
    ):
        pass
    assert names(tmp_path) == []


def test_rows_arrive_in_any_order_and_parts_go_to_their_places(tmp_path: Path) -> None:
    rows = np.arange(5 * 6, dtype=np.uint8).reshape(5, 6)
    paths = [tmp_path / "a", tmp_path / "b"]
    with paths[0].open("wb") as a, paths[1].open("wb") as b:
        ranges = (ByteRange("w", 3, 4),), (ByteRange("w", 1, 2, first=4),)
        sink = Sink(paths, [a, b], [OutputFile(name, b"", found) for name, found in zip("ab", ranges, strict=True)])
        sink.put("w", 3, rows[3:])
        sink.put("w", 0, rows[:3])
    assert paths[0].read_bytes() == bytes(3) + rows[:, :4].tobytes()
    assert paths[1].read_bytes() == bytes(1) + rows[:, 4:].tobytes()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
@pytest.mark.parametrize("held", [1, 400, 1 << 20])
def test_transposed_rows(held: int, order: tuple[int, ...], tmp_path: Path, monkeypatch: Any) -> None:
    """Two tensors side by side in one array, their chunks in turns and in any order, however few rows are held."""
    monkeypatch.setattr("smolexport.conversion.writer.BUFFERED", held)
    monkeypatch.setattr("smolexport.conversion.writer.COLUMNS_AT_ONCE", 3)
    first, second = (np.random.default_rng(s).integers(0, 256, (n, 11), np.uint8) for s, n in ((1, 8), (2, 12)))
    with (tmp_path / "x").open("wb") as file:
        ranges = (
            ByteRange("first", 5, 7, pitch=20), ByteRange("first", 200, 4, first=7),
            ByteRange("second", 5 + 8, 7, pitch=20), ByteRange("second", 200 + 8 * 4, 4, first=7),
        )  # fmt: skip
        sink = Sink([tmp_path / "x"], [file], [OutputFile("x", b"", ranges)])
        for number in order:
            sink.put("first", 2 * number, first[2 * number : 2 * number + 2])
            sink.put("second", 3 * number, second[3 * number : 3 * number + 3])
        sink.flush()
    both, written = np.concatenate([first, second]), (tmp_path / "x").read_bytes()
    assert written[5:145] == both[:, :7].T.tobytes()
    assert written[200:] == both[:, 7:].tobytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        sink = Sink([tmp_path / "x"], [full], [OutputFile("x", b"", (ByteRange("w", 0, 4),))])
        with pytest.raises(OutputError, match=r"x: No space left on device; nothing was written"):
            sink.put("w", 0, np.zeros((1, 4), np.uint8))
        transposed = Sink([tmp_path / "x"], [full], [OutputFile("x", b"", (ByteRange("w", 0, 4, pitch=1),))])
        transposed.put("w", 0, np.zeros((1, 4), np.uint8))
        with pytest.raises(OutputError, match=r"x: No space left on device; nothing was written"):
            transposed.flush()

"""Outputs appear whole or not at all: existing names, full disks, races, things that are no files."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from smolexport.conversion.pipeline import export, write
from smolexport.conversion.prepare import ExportKeywords, ExportRequest, prepare
from smolexport.errors import OutputError
from smolexport.files import atomic_file, check_target, leftovers
from tests.cli.commands import LIMITED, START, assert_refused, call, environment, tiny_checkpoint


class Usage(NamedTuple):
    free: int


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with atomic_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
    assert path.read_bytes() == b"half"
    assert list(tmp_path.iterdir()) == [path]


def test_has_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "x.bin") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "x.bin").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_nothing_stays_after_an_error(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_file(tmp_path / "x.bin") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_file(path, force=True) as file:
            file.write(b"new")
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"x\.bin: No space left on device; nothing was written"):
        fail()
    assert path.read_bytes() == b"old"


def test_a_name_that_appears_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"

    def late(force: bool) -> None:
        with atomic_file(path, force=force) as file:
            file.write(b"late")
            path.write_bytes(b"first")

    with pytest.raises(OutputError, match="appeared while it was being written"):
        late(force=False)
    assert path.read_bytes() == b"first"
    late(force=True)
    assert path.read_bytes() == b"late"
    assert list(tmp_path.iterdir()) == [path]


def test_of_many_writers_one_wins(tmp_path: Path) -> None:
    """Sixteen threads meet in front of the same name; the file is one writer's, whole."""
    meet, won, lost = threading.Barrier(16), [], []

    def write(number: int) -> None:
        try:
            with atomic_file(tmp_path / "x.bin") as file:
                file.write(bytes([number]) * 1000)
                meet.wait()
            won.append(number)
        except OutputError:
            lost.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 15)
    assert (tmp_path / "x.bin").read_bytes() == bytes(won) * 1000
    assert len(list(tmp_path.iterdir())) == 1


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems such as FAT have none; the name is still never overwritten."""

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with atomic_file(tmp_path / "x.bin") as file:
        file.write(b"one")
    with pytest.raises(OutputError, match="appeared"), atomic_file(tmp_path / "x.bin") as file:
        file.write(b"two")
    assert (tmp_path / "x.bin").read_bytes() == b"one"
    assert len(list(tmp_path.iterdir())) == 1


def test_long_names(tmp_path: Path) -> None:
    """The hidden file's name must not be what makes a permitted name too long."""
    path = tmp_path / ("ü" * 127)
    with atomic_file(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"
    with pytest.raises(OutputError), atomic_file(tmp_path / "no such folder" / "x"):
        pass


def test_existing_output(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"precious")
    assert_refused(call("gguf", tiny, "-q", "f16", "-o", path), path, "exists already; pass --force")
    assert path.read_bytes() == b"precious"
    assert call("gguf", tiny, "-q", "f16", "-o", path, "--force").code == 0
    assert path.read_bytes()[:4] == b"GGUF"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_bytes(b"")
    (tmp_path / "folder" / "tiny-f16.gguf").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    for out, said in {
        tmp_path / "no" / "x.gguf": f"{tmp_path / 'no'}: no such folder",
        tmp_path / "a file" / "x.gguf": f"{tmp_path / 'a file'}: no such folder",
        tmp_path / "folder": "tiny-f16.gguf: is a folder",
        tmp_path / "pipe": "is a device or pipe",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        outcome = call("gguf", tiny, "-q", "f16", "-o", out, "--force")
        assert_refused(outcome, said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a file", "folder", "pipe"]
    # Without --force, so that a mistake here costs nobody their /dev/null.
    assert_refused(call("gguf", tiny, "-q", "f16", "-o", "/dev/null"), "/dev/null: is a device or pipe")


def test_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked through the answer of the system, since tests may run as a user who may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(OutputError, match="cannot be written to"):
        check_target(tmp_path / "x.gguf", 1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tiny: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert_refused(call("gguf", tiny, "-q", "f16", "-o", tmp_path / "x"), "cannot be written to")
    tmp_path.chmod(0o755)


def test_too_little_space_is_seen_before_the_work(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=100_000))
    outcome = call("gguf", tiny, "-q", "f16", "-o", tmp_path / "x.gguf")
    assert_refused(outcome, tmp_path, "MB are needed, 0 MB are free")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing(tiny: Path, tmp_path: Path) -> None:
    """A limit on file sizes lets the first writes through and refuses a later one, as a full disk does."""
    done = subprocess.run(
        [START[0], "-c", LIMITED, "gguf", str(tiny), "-q", "f16", "-o", str(tmp_path / "x.gguf")],
        check=False, capture_output=True, text=True, env=environment({"NUMBA_CACHE_DIR": ""}), timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"smolexport: {tmp_path / 'x.gguf'}: File too large; nothing was written"
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_behind_stdout(tiny: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*START, "list"], check=False, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60
        )
    assert (done.returncode, done.stderr) == (2, "smolexport: stdout: No space left on device\n")


def test_arguments_of_the_space_check(tmp_path: Path) -> None:
    check_target(tmp_path / "x", 1)
    free: Any = shutil.disk_usage(tmp_path).free
    with pytest.raises(OutputError, match="MB are needed"):
        check_target(tmp_path / "x", 2 * free)


def test_trouble_of_the_system_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"xxx: File name too long; give another name"):
        check_target(tmp_path / ("x" * 300), 1)

    def fail(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    with pytest.raises(OutputError, match=r"x\.gguf: Input/output error"):
        check_target(tmp_path / "x.gguf", 1)


def test_over_long_names_in_the_library(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        prepare("gguf", tiny, tmp_path / ("x" * 300))


def test_prepare_looks_at_the_target_when_told(tiny: Path, tmp_path: Path) -> None:
    """Without `force` the question is left to `write`, which gets its own."""
    path = tmp_path / "x.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        prepare("gguf", tiny, path, quant="f16", force=False)
    assert prepare("gguf", tiny, path, quant="f16", force=True).path == path
    job = prepare("gguf", tiny, path, quant="f16")
    with pytest.raises(OutputError, match="exists already"):
        write(job)
    assert path.read_bytes() == b"precious"
    write(job, force=True)
    assert path.read_bytes()[:4] == b"GGUF"


def test_keywords_are_those_of_a_request(tiny: Path) -> None:
    request, keywords = set(ExportRequest.__dataclass_fields__), set(ExportKeywords.__annotations__)
    assert request - {"source"} == keywords
    with pytest.raises(TypeError, match="quantization"):
        export("gguf", tiny, quantization="q8_0")  # type: ignore[call-arg]


def test_a_target_is_checked_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `prepare` if it is given `force`, else by `write`; again only if that is given another one."""
    from smolexport.conversion import prepare as module

    checked: list[tuple[Path, int, bool]] = []

    def check(path: Path, nbytes: int, *, force: bool, replaceable: object) -> None:
        checked.append((path, nbytes, force))

    monkeypatch.setattr(module, "check_target", check)
    job = prepare("gguf", tiny, tmp_path / "a.gguf", quant="f16", force=False)
    done = write(job)
    assert checked == [(done.path, done.bytes, False)]
    checked.clear()
    write(prepare("gguf", tiny, tmp_path / "b.gguf", quant="f16"))
    assert len(checked) == 1
    checked.clear()
    write(job, force=True)
    assert checked == [(done.path, done.bytes, True)]
    checked.clear()
    jobs = module.prepare_all(tiny, tmp_path, targets=["gguf", "mlx"], force=False)
    sizes = [job.plan.size for job in jobs]
    assert [(nbytes, force) for _, nbytes, force in checked] == [(sum(sizes), False), (0, False)]  # one disk, once


def remain(folder: Path, name: str, minutes: float) -> Path:
    """What a killed export to `name` leaves, last written to so many minutes ago."""
    path = folder / name

    def killed() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            file.flush()
            [hidden] = (p for p in folder.glob(".*.partial") if p.name.startswith(f".{name[:40]}."))
            kept.append(hidden.rename(hidden.with_suffix(".kept")))
            raise KeyboardInterrupt

    kept: list[Path] = []
    with pytest.raises(KeyboardInterrupt):
        killed()
    hidden = kept[0].rename(kept[0].with_suffix(".partial"))
    then = time.time() - 60 * minutes
    os.utime(hidden, (then, then))
    return hidden


def test_leftovers(tmp_path: Path) -> None:
    old, long = remain(tmp_path, "x.gguf", 60), remain(tmp_path, "y" * 100, 60)
    assert leftovers(tmp_path / "x.gguf") == [f"{old} is left from an export that was killed; it can be deleted"]
    assert len(leftovers(tmp_path / ("y" * 100))) == 1
    new = remain(tmp_path, "z.gguf", 1)
    assert leftovers(tmp_path / "z.gguf") == [], "may still be written to"
    assert leftovers(tmp_path / "x") == [], "another target's"
    assert leftovers(tmp_path / "no" / "x.gguf") == []
    assert sorted(tmp_path.iterdir()) == sorted([old, long, new])


def test_leftovers_are_named_and_kept(tiny: Path, tmp_path: Path) -> None:
    old = remain(tmp_path, "x.gguf", 60)
    note = f"note: {old} is left from an export that was killed; it can be deleted"
    outcome = call("gguf", tiny, "-q", "f16", "-o", tmp_path / "x.gguf")
    assert (outcome.code, outcome.err.splitlines().count(note)) == (0, 1)
    assert old.exists()
    old.unlink()
    assert note not in call("gguf", tiny, "-q", "f16", "-o", tmp_path / "x.gguf", "--force").err

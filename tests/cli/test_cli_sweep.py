"""`smolexport sweep` on the command line: what it says before, meanwhile and afterwards."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from smolexport import plugins
from tests.cli.commands import START, assert_refused, call, environment, run

QUICK = ("--no-compare", "--jobs", "2")


def test_dry_run(tiny: Path, tmp_path: Path) -> None:
    """The sizes of what would be made, what is left out, what is not there; nothing is written."""
    wish = ("sweep", tiny, "demo", "--formats", "gguf,mlx", "-q", "int8,q4_k", "-o", tmp_path / "out")
    outcome = call(*wish, "--dry-run")
    assert (outcome.code, outcome.err) == (0, "note: mlx has no scheme q4_k: skipped\n")
    assert list(tmp_path.iterdir()) == []
    table = [re.split(r" {2,}", line.strip()) for line in outcome.out.splitlines()]
    assert table[0] == [
        "checkpoint",
        "format",
        "scheme",
        "MB",
        "bits/weight",
        "KLD",
        "top-1",
        "PPL ratio",
        "seconds",
        "state",
    ]
    assert [line[:3] + line[-1:] for line in table[1:]] == [
        [name, form, scheme, "to do"]
        for name in ("tiny", "demo")
        for form, scheme in (("gguf", "int8"), ("gguf", "q4_k_m"), ("mlx", "int8"))
    ]
    lost = call(*wish, tmp_path / "lost", "--dry-run", "--json")
    assert lost.code == 1
    found = json.loads(lost.out)["tasks"]
    assert [row["state"] for row in found] == ["to do"] * 6 + ["failed"] * 3
    alone = json.loads(call("gguf", tiny, "-q", "int8", "--dry-run", "--json").out)
    assert found[0]["bits_per_weight"] == alone["bits_per_weight"]
    assert found[0]["bytes"] >= alone["tensor_bytes"]


def test_dry_run_of_what_is_done(tiny: Path, tmp_path: Path) -> None:
    wish = ("sweep", tiny, "--formats", "gguf", "-o", tmp_path / "out", "--json")
    assert call(*wish, "-q", "int8", *QUICK).code == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*"))
    for options, states in (
        (("-q", "int8,int4", *QUICK), ["kept", "to do"]),
        (("-q", "int8"), ["to do"]),  # to be compared
        (("-q", "int8", "--force", *QUICK), ["to do"]),
    ):
        outcome = call(*wish, *options, "--dry-run")
        assert [row["state"] for row in json.loads(outcome.out)["tasks"]] == states
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*")) == before


def test_what_it_says(tiny: Path, tmp_path: Path) -> None:
    outcome = call("sweep", tiny, "--formats", "gguf", "-q", "q8_0,gguf:q8_0", "-o", tmp_path / "out", *QUICK)
    assert outcome.code == 0
    first, second = outcome.err.splitlines()
    assert re.fullmatch(r"2 at a time, \d+ threads each", first)
    assert re.fullmatch(r"\[1/1\] tiny gguf q8_0: 0\.\d MB, \d\.\d\d bits per weight, \d+\.\d s", second)
    assert outcome.out.count("\n") == 2
    kept = call("sweep", tiny, "--formats", "gguf", "-q", "q8_0", "-o", tmp_path / "out", *QUICK)
    assert kept.err.endswith(" bits per weight, kept\n")


def test_files_of_others_are_safe(tiny: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "tiny" / "tiny-q8_0.gguf"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    wish = ("sweep", tiny, "--formats", "gguf", "-q", "q8_0", "-o", tmp_path / "out", *QUICK)
    outcome = call(*wish)
    assert outcome.code == 1
    assert f"failed: {mine}: exists already, not made by a sweep; remove it or pass --force" in outcome.out
    assert mine.read_text() == "mine"
    assert call(*wish, "--force").code == 0
    assert mine.read_bytes()[:4] == b"GGUF"


def test_a_table_of_others_is_safe(tiny: Path, tmp_path: Path) -> None:
    mine = tmp_path / "sweep.json"
    mine.write_text("mine")
    wish = ("sweep", tiny, "--formats", "gguf", "-q", "q8_0", "-o", tmp_path, *QUICK)
    assert_refused(call(*wish), f"{mine}: exists already, not made by a sweep; remove it or give another folder")
    assert mine.read_text() == "mine"


def test_a_file_is_no_place(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    for option in ((), ("--dry-run",)):
        refused = call("sweep", tiny, "--formats", "gguf", "-o", tmp_path / "out", *option, *QUICK)
        assert_refused(refused, f"{tmp_path}/out: is not a folder; give another one with -o")


def test_outputs_into_the_checkpoint_are_refused(tiny: Path) -> None:
    assert_refused(call("sweep", tiny, "-o", tiny, *QUICK), "cannot hold the outputs of")
    assert_refused(call("sweep", tiny, "-o", tiny.parent, *QUICK), f"{tiny}: cannot hold the outputs of {tiny}")


def test_a_library_that_is_missing_for_the_comparison(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "missing", lambda name: "needs torch: pip install torch" if name == "torch" else None)
    refused = call("sweep", tiny, "-o", tmp_path / "out")
    assert_refused(refused, "needs torch: pip install torch; or pass --no-compare")
    assert not (tmp_path / "out").exists()


def test_bars_on_a_terminal(tiny: Path, tmp_path: Path) -> None:
    """Lines of what has ended stand above the bars, which are gone at the end; stdout has the table alone."""
    ours, theirs = pty.openpty()
    argv = [*START, "sweep", str(tiny), "--formats", "gguf", "-q", "q8_0,int4", "-o", str(tmp_path / "out"), *QUICK]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment()) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux says so where other systems give nothing
                break
            if not piece:
                break
            shown += piece
        out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "tiny gguf q8_0" in text
    assert re.search(r"\[2/2\] tiny gguf \w+: 0\.\d MB", text)
    assert "0/2" in text
    assert out.count(" new") == 2
    assert "\x1b" not in out


def test_the_terminal_is_not_needed(tiny: Path, tmp_path: Path) -> None:
    """As a job without stdin, from another folder, with relative paths."""
    wish = ("sweep", tiny.name, "--formats", "gguf", "-q", "q8_0", "-o", os.path.relpath(tmp_path / "out", tiny.parent))
    outcome = run(*wish, *QUICK, cwd=tiny.parent)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / "tiny" / "tiny-q8_0.gguf").exists()

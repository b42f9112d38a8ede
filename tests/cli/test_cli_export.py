"""`smolexport gguf`: plans, names, notes on stderr, data on stdout."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from smolexport import inspect
from tests.cli.commands import START, assert_refused, call, environment, run, tiny_checkpoint


def test_dry_run_prints_the_plan_and_writes_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call("gguf", tiny, "--dry-run", "-q", "q8_0")
    assert outcome.code == 0
    assert outcome.out.startswith("gguf q8_0 (llama): 20 tensors, ")
    for line in ("metadata", "tensors", "  general.architecture", "  blk.1.ffn_down.weight"):
        assert f"\n{line}" in outcome.out
    assert outcome.err == ""
    assert list(tmp_path.iterdir()) == []


def test_dry_run_as_json(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    facts = json.loads(call("gguf", tiny, "--dry-run", "--json", "-q", "q4_k", "-o", target).out)
    assert not target.exists()
    assert facts["scheme"] == "q4_k_m"
    assert facts["fallbacks"] == sum(t["wanted"] is not None for t in facts["tensors"]) > 0
    assert facts["tensor_bytes"] == sum(t["bytes"] for t in facts["tensors"])
    assert sum(f["tensors"] for f in facts["formats"].values()) == len(facts["tensors"]) == 20
    call("gguf", tiny, "-q", "q4_k", "-o", target)
    assert [(t.name, list(t.shape), t.format) for t in inspect(target).tensors] == [
        (t["name"], t["shape"], t["format"]) for t in facts["tensors"]
    ]


def test_path_on_stdout_notes_on_stderr(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    outcome = run("gguf", tiny, "-q", "q8_0", "-o", target)
    assert (outcome.code, outcome.out) == (0, f"{target}\n")
    assert "q8_0 (llama): 20 tensors" in outcome.err
    assert "\x1b" not in outcome.err, "no bar without a terminal"
    assert target.stat().st_size == inspect(target).bytes


def test_json_alone_on_stdout(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    outcome = run("gguf", tiny, "-q", "q8_0", "-o", target, "--json")
    facts = json.loads(outcome.out)
    assert facts["path"] == str(target)
    assert facts["bytes"] == target.stat().st_size
    assert facts["bits_per_weight"] == pytest.approx(inspect(target).bits_per_weight, abs=1e-3)


def test_default_names(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("gguf", tiny).out == "tiny-q4_k_m.gguf\n"
    (tmp_path / "folder").mkdir()
    assert call("gguf", tiny, "-q", "Q8-0", "-o", "folder").out == "folder/tiny-q8_0.gguf\n"
    assert call("gguf", tiny, "-q", "f16", "--name", "Mine").out == "Mine-f16.gguf\n"
    assert inspect("Mine-f16.gguf").name == "Mine"
    assert inspect("tiny-q4_k_m.gguf").name == "tiny"
    assert call("gguf", f"{tiny}/", "-q", "f32").out == "tiny-f32.gguf\n"
    monkeypatch.chdir(tiny)
    assert call("gguf", ".", "-q", "f16", "-o", tmp_path / "folder").out == f"{tmp_path}/folder/tiny-f16.gguf\n"


def test_the_word_demo_beside_a_folder_that_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert json.loads(call("gguf", "demo", "-q", "q8_0", "--dry-run", "--json").out)["path"] == "demo-q8_0.gguf"


@pytest.mark.parametrize("name", ["a/b", "../up", "..", "with\nbreak"])
def test_a_name_cannot_choose_the_folder(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    outcome = call("gguf", tiny, "-q", "f16", "--name", name)
    assert outcome.code == 0
    [written] = (tmp_path / "inside").iterdir()
    assert list(tmp_path.iterdir()) == [tmp_path / "inside"]
    assert written.name.isprintable()
    assert inspect(written).name == name


def test_strict(tiny: Path, tmp_path: Path) -> None:
    outcome = call("gguf", tiny, "-q", "q4_k", "--strict", "-o", tmp_path)
    assert_refused(
        outcome, "--strict: q4_k_m does not fit", "row length 64 is not a multiple of 256; using q5_0 instead of q4_k"
    )
    assert list(tmp_path.iterdir()) == []
    assert call("gguf", tiny, "-q", "q8_0", "--strict", "-o", tmp_path).code == 0


def test_same_bytes_whatever_the_threads(tiny: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        call("gguf", tiny, "-q", "q4_k", "--name", "x", "--threads", str(threads), "-o", tmp_path / f"{threads}.gguf")
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_ignore_config(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "key_of_tomorrow": 1}))
    assert_refused(call("gguf", folder, "--dry-run"), "pass --ignore-config key_of_tomorrow")
    assert call("gguf", folder, "--dry-run", "--ignore-config", "key_of_tomorrow").code == 0


def test_what_the_format_cannot_hold_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "smollm3", no_rope_layers=[1, 0], no_rope_layer_interval=2)
    (tmp_path / "out").mkdir()
    outcome = call("gguf", folder, "-o", tmp_path / "out")
    assert_refused(outcome, "cannot be exported to gguf", "on layers [1, 1]", "on layers [1, 0]")
    assert list((tmp_path / "out").iterdir()) == []


def test_odd_bytes_in_paths_and_a_terminal_without_unicode(tiny: Path, tmp_path: Path) -> None:
    """A path that is not UTF-8, printed where only ASCII can be: replaced, never a traceback."""
    odd = tmp_path / os.fsdecode(b"\xff\xc3\xa4")
    odd.mkdir()
    argv = [*map(os.fsencode, START), b"gguf", os.fsencode(tiny), b"-q", b"f16", b"-o", os.fsencode(odd)]
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            [*argv, b"--force"],
            check=False,
            capture_output=True,
            env=environment({"PYTHONIOENCODING": encoding}),
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(b"/tiny-f16.gguf\n")
    assert [p.name for p in odd.iterdir()] == ["tiny-f16.gguf"]
    again = subprocess.run(argv, check=False, capture_output=True, env=environment(), timeout=60)
    assert (again.returncode, again.stdout) == (2, b"")
    assert b"exists already" in again.stderr.splitlines()[-1]

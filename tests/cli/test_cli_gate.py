"""`compare --gate --junit`: what goes in, what comes out, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.cli.commands import assert_refused, call
from tests.cli.test_cli_play import FEW, TEXT, needs_runtimes

FAST = (*FEW[:4], "--greedy-tokens", "0", "--repetitions", "0", *FEW[-3:])


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    path = tmp_path / "parity.toml"
    path.write_text("[default]\nmin_top1 = 0\n[gguf.q8_0]\nmax_kld = 0.0000001\n")
    return path


@needs_runtimes
def test_a_gate_judges_and_a_flag_overrides_it(tiny: Path, exported: Path, folder: Path, gate: Path) -> None:
    words, report = gate.with_name("words.txt"), gate.with_name("out.xml")
    words.write_text(TEXT)
    ask = ("compare", tiny, exported, folder, "--text", words, "--gate", gate, "--junit", report, *FAST)
    outcome = call(*ask)
    assert outcome.code == 1, outcome.err
    assert f"MISSED: {exported.name}: mean KLD" in outcome.out
    failed = {
        (case.get("classname"), case.get("name"))
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("failure") is not None
    }
    assert failed == {(f"parity.{exported.name}", "max_kld")}
    outcome = call(*ask, "--max-kld", "5")
    assert outcome.code == 0, outcome.err
    assert "PASSED: every file meets its thresholds" in outcome.out
    names = [case.get("name") for case in ElementTree.parse(report).iter("testcase")]
    assert names == ["finite", "max_kld", "min_top1"] * 2


def test_refusals_come_before_any_work(tiny: Path, exported: Path, gate: Path, tmp_path: Path) -> None:
    gate.write_text("[gguf.q8_0]\nmax_kdl = 1\n")
    assert_refused(call("compare", tiny, exported, "--gate", gate), gate, "[gguf.q8_0] max_kdl: is not a threshold")
    assert_refused(call("compare", tiny, exported, "--gate", tmp_path / "none.toml"), "none.toml: No such file")
    assert_refused(call("compare", tiny, exported, "--junit", tmp_path), "is a folder", "--junit")
    assert_refused(call("compare", tiny, exported, "--junit", tmp_path / "none" / "x.xml"), "none: no such folder")


@needs_runtimes
def test_chats_stand_on_the_sheet(tiny: Path, exported: Path, tmp_path: Path) -> None:
    """As they are by default; an edited template in the file becomes a note."""
    (tmp_path / "words.txt").write_text(TEXT)
    data = exported.read_bytes()
    assert data.count(b"'<|im_end|>\n'") == 1
    (tmp_path / "edited.gguf").write_bytes(data.replace(b"'<|im_end|>\n'", b"'<|im_end|>\t'"))
    ask = ("compare", tiny, exported, tmp_path / "edited.gguf", "--text", tmp_path / "words.txt", "--json", *FAST[:-1])
    outcome = call(*ask)
    assert outcome.code == 0, outcome.err
    good, bad = json.loads(outcome.out)["candidates"]
    assert all(check["equal"] for check in good["chat"])
    assert {"text english", "chat user"} <= {check["name"] for check in good["chat"]}
    assert [check["equal"] for check in bad["chat"]] == [not check["name"].startswith("chat") for check in bad["chat"]]
    assert any("texts and chats differ from the checkpoint's: chat user" in line for line in bad["notes"])

"""`inspect` and `list`: what is in a file, and what there is; quiet when nobody reads on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from smolexport import inspect
from smolexport.arch import architectures
from tests.cli.commands import START, call, environment


def test_inspect_text(exported: Path) -> None:
    outcome = call("inspect", exported)
    assert (outcome.code, outcome.err) == (0, "")
    first, second, *rest = outcome.out.splitlines()
    assert first == f"{exported}: gguf q8_0, llama, 'tiny'"
    assert second.startswith(f"{exported.stat().st_size:,} bytes, ")
    assert any(line.split()[:3] == ["q8_0", "15", "tensors"] for line in rest)
    assert any(line.split() == ["llama.block_count", "2"] for line in rest)
    assert any("tokenizer.ggml.token_type" in line and "[3, 3, 3, 1, ...] (320 values)" in line for line in rest)
    assert any("blk.0.attn_q.weight" in line and "64 x 64" in line for line in rest)
    assert "np." not in outcome.out
    short = call("inspect", exported, "--no-tensors").out
    assert "blk.0.attn_q.weight" not in short
    assert "llama.block_count" in short


def test_inspect_json(exported: Path) -> None:
    facts = json.loads(call("inspect", "--json", exported).out)
    found = inspect(exported)
    assert (facts["path"], facts["bytes"], facts["weights"]) == (str(exported), found.bytes, found.weights)
    assert (facts["format"], facts["scheme"], facts["architecture"]) == ("gguf", "q8_0", "llama")
    assert facts["metadata"]["llama.block_count"] == 2
    assert len(facts["metadata"]["tokenizer.ggml.tokens"]) == 320
    assert len(facts["tensors"]) == 20
    end = max(t["offset"] + t["bytes"] for t in facts["tensors"])
    assert 0 <= facts["bytes"] - end < 32
    assert sum(f["bytes"] for f in facts["formats"].values()) == sum(t["bytes"] for t in facts["tensors"])
    assert "tensors" not in json.loads(call("inspect", "--json", "--no-tensors", exported).out)


def test_list() -> None:
    outcome = call("list")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"architectures: {', '.join(architectures())}" in outcome.out
    for word in ("q4_k_m", "(default)", "llama.cpp", "torch", "plays gguf", "plays checkpoint"):
        assert word in outcome.out
    schemes = call("list", "gguf").out
    assert "q8_0" in schemes
    assert "architectures" not in schemes


def test_list_json() -> None:
    facts = json.loads(call("list", "--json").out)
    assert facts["architectures"] == architectures()
    assert {"f32", "q8_0", "q4_0", "q4_k_m", "iq4_nl"} <= set(facts["formats"]["gguf"])
    assert facts["runtimes"]["torch"]["reads"] == "checkpoint"
    assert sum("(default)" in about for about in facts["formats"]["gguf"].values()) == 1
    only = json.loads(call("list", "--json", "gguf").out)
    assert only == {"formats": {"gguf": facts["formats"]["gguf"]}, "options": {"gguf": {}}}


@pytest.mark.parametrize("reader", ["head -n 1", "head -c 1", "true"])
def test_a_reader_that_goes_away(reader: str, exported: Path) -> None:
    """Nothing on stderr, and soon over."""
    command = 'exec 3>&1; { sleep 0.2; "$@"; } 2>&3 | ' + reader + " >/dev/null"
    done = subprocess.run(
        ["bash", "-c", command, "bash", *START, "inspect", "--json", str(exported)],
        check=False, capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip
    assert done.stdout == ""
    assert done.stderr == ""

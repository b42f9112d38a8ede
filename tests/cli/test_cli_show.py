"""`inspect` and `list`: what is in a file, and what there is; quiet when nobody reads on."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from smolexport import inspect, plugins
from smolexport.errors import FileFormatError
from smolexport.model.arch import architectures
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


def broken(folder: Path, path: Path, **keys: object) -> Path:
    """A copy of an MLX folder whose config.json has further keys."""
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **keys}))
    return path


def test_inspect_a_folder(folder: Path) -> None:
    outcome = call("inspect", folder)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{folder}: mlx q8, llama, 'tiny'\n")
    facts = json.loads(call("inspect", "--json", folder).out)
    assert facts["findings"] == []
    default = {"group_size": 64, "bits": 8, "mode": "affine"}
    assert facts["metadata"]["config.quantization"].items() >= default.items()
    assert len(facts["fingerprint"]) == 32


def test_what_a_reader_would_refuse_is_noted(folder: Path, tmp_path: Path) -> None:
    path = broken(folder, tmp_path / "x", _name_or_path="/here")
    said = "_name_or_path should not be in config.json"
    outcome = call("inspect", path)
    assert outcome.code == 0
    assert f"note: {said}\n" in outcome.err
    assert said not in outcome.out
    assert json.loads(call("inspect", "--json", path).out)["findings"] == [said]


def test_a_check_that_breaks_off_hides_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lint(path: Path) -> list[str]:
        raise FileFormatError(f"{path}: cannot\nbe checked")

    monkeypatch.setattr(plugins.converter("mlx"), "lint", lint)
    outcome = call("inspect", folder)
    assert outcome.code == 0
    assert outcome.err == f"note: {folder}: cannot be checked\n"
    assert outcome.out.startswith(f"{folder}: mlx q8")
    assert json.loads(call("inspect", "--json", folder).out)["findings"] == [f"{folder}: cannot be checked"]


def test_metadata_that_json_cannot_hold(folder: Path, tmp_path: Path) -> None:
    odd = {"a": {"b": [float("nan"), {"c": float("inf")}]}, "d": -float("inf"), "e": [{"f": float("nan")}]}
    path = broken(folder, tmp_path / "x", **odd)
    outcome = call("inspect", "--json", "--no-fingerprint", path)
    assert outcome.code == 0, outcome.err
    metadata = json.loads(outcome.out, parse_constant=pytest.fail)["metadata"]
    assert metadata["config.a"] == {"b": ["nan", {"c": "inf"}]}
    assert (metadata["config.d"], metadata["config.e"]) == ("-inf", [{"f": "nan"}])
    assert call("inspect", "--no-fingerprint", path).code == 0


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"k": ', "}")])
def test_metadata_that_is_nested_deeply(start: str, end: str, folder: Path, tmp_path: Path) -> None:
    path = broken(
        folder, tmp_path / "x", deep="HERE", flat=[[i] for i in range(99)], wide={str(i): i for i in range(99)}
    )
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"HERE"', f"{start * 300}1{end * 300}"))
    outcome = call("inspect", "--json", "--no-fingerprint", path)
    assert outcome.code == 0, outcome.err
    facts = json.loads(outcome.out)
    assert '"..."' in json.dumps(facts["metadata"]["config.deep"])
    assert len(facts["metadata"]["config.flat"]) == len(facts["metadata"]["config.wide"]) == 99
    told = call("inspect", "--no-fingerprint", path)
    assert told.code == 0, told.err
    assert "[[0], [1], [2], [3], ...] (99 values)" in told.out
    assert "(99 keys)" in told.out
    assert max(map(len, told.out.splitlines())) < 250


@pytest.mark.parametrize("encoding", ["utf-8", "koi8-r", "latin-1", "ascii", "utf-16"])
def test_json_in_any_encoding(encoding: str, tiny: Path, tmp_path: Path) -> None:
    name = "Größe Ж 漢 \N{GRINNING FACE}"
    call("gguf", tiny, "-q", "f16", "--name", name, "-o", tmp_path / "x.gguf")
    done = subprocess.run(
        [*START, "inspect", str(tmp_path / "x.gguf"), "--json", "--no-tensors"],
        check=True, capture_output=True, env=environment({"PYTHONIOENCODING": encoding}), timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout.decode(encoding))["name"] == name
    assert done.stdout.decode(encoding).isascii(), "what a terminal obeys is not only below U+0020"


def test_list() -> None:
    outcome = call("list")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"architectures: {', '.join(architectures())}" in outcome.out
    for word in ("q4_k_m", "(default)", "llama.cpp", "torch", "runs gguf", "runs checkpoint"):
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
    assert only == {"formats": {"gguf": facts["formats"]["gguf"]}, "options": {"gguf": facts["options"]["gguf"]}}
    assert list(facts["options"]["gguf"]) == ["imatrix"]


@pytest.mark.parametrize("reader", ["head -n 1", "head -c 1", "true"])
def test_a_reader_that_goes_away(reader: str, exported: Path) -> None:
    """Nothing on stderr, no failure, and soon over."""
    command = 'set -o pipefail; exec 3>&1; { sleep 0.2; "$@"; } 2>&3 | ' + reader + " >/dev/null"
    done = subprocess.run(
        ["bash", "-c", command, "bash", *START, "inspect", "--json", str(exported)],
        check=False, capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

"""One graph of an ONNX folder where a file is asked for, and what lies in a folder that is no file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from smolexport.conversion.pipeline import export
from tests.cli.commands import Outcome, assert_refused, call, run

PLAY = ("--threads", "1", "-n", "4")


@pytest.fixture(scope="module")
def several(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("onnx", tiny, tmp_path_factory.mktemp("several") / "tiny-onnx", quant="int4+f32").path


def assert_written(outcome: Outcome, text: str) -> None:
    assert (outcome.code, outcome.out) == (0, text), outcome.err


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_a_graph_is_played(runtime: str, several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(runtime.replace("-", "_"), reason=f"{runtime} is not installed")
    graphs, options = several / "onnx", (*PLAY, "--runtime", runtime)
    wide = call("generate", several, "Once", *options, "--set", "graph=f32").out
    assert_written(call("generate", graphs / "model.onnx", "Once", *options), wide)
    monkeypatch.chdir(graphs)
    assert_written(call("generate", "model.onnx", "Once", *options), wide)
    both = call("generate", "model.onnx", "Once", *options, "--set", "graph=int4")
    assert_refused(both, "model.onnx: is a graph, and the option graph names one too")


def test_the_graphs_of_a_folder_are_compared(tiny: Path, several: Path) -> None:
    for name in ("onnxruntime", "torch"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    amounts = ("--window", "32", "--max-windows", "1", "--greedy-tokens", "0", "--repetitions", "0", "--threads", "1")
    files = (several / "onnx" / "model.onnx", several / "onnx" / "model_q4.onnx")
    outcome = call("compare", tiny, *files, *amounts, "--dtype", "f32", "--json")
    assert outcome.code == 0, outcome.err
    wide, narrow = json.loads(outcome.out)["candidates"]
    assert (wide["scheme"], narrow["scheme"]) == ("f32", "int4")
    assert wide["bits_per_weight"] == 32 > 2 * narrow["bits_per_weight"]
    assert wide["kld"]["mean"] < 1e-6 < narrow["kld"]["mean"]


def test_a_graph_is_as_large_as_its_own_files(several: Path, tmp_path: Path) -> None:
    for file in (several / "onnx").glob("model.onnx*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "film.mp4").write_bytes(bytes(1 << 20))
    outcome = call("inspect", tmp_path / "model.onnx", "--json", "--no-fingerprint")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out)["bytes"] == sum(file.stat().st_size for file in tmp_path.glob("model.onnx*"))
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    played = call("generate", tmp_path / "model.onnx", "Once", *PLAY)
    assert_refused(played, tmp_path / "model.onnx", "must be in the folder onnx of an ONNX folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_not_waited_for(several: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(several, tmp_path / "piped"))
    os.mkfifo(folder / "onnx" / "model_int8.onnx")
    shown = run("inspect", folder, "--json", "--no-fingerprint")
    assert (shown.code, json.loads(shown.out)["scheme"]) == (0, "int4+f32")
    (folder / "genai_config.json").unlink()
    os.mkfifo(folder / "genai_config.json")
    assert "genai_config.json: is not a regular file" in run("inspect", folder).err


@pytest.mark.parametrize("schemes", ["int4+", "+", "int4++f32", " +f32"])
def test_nothing_beside_a_plus(schemes: str, tiny: Path) -> None:
    outcome = call("onnx", tiny, "-q", schemes, "--dry-run")
    assert_refused(outcome, f"--quant {schemes}: each + must be between two schemes")

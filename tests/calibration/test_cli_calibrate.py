"""`smolexport calibrate`: what it prints, what it refuses, and the importance matrix that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from smolexport.calibration.statistics import open_statistics
from smolexport.conversion.prepare import prepare
from smolexport.model.checkpoint import open_checkpoint
from smolexport_to_gguf.architectures import output_name
from smolexport_to_gguf.imatrix import read_imatrix
from tests.calibration.models import ids_file
from tests.children import python
from tests.cli.commands import assert_refused, call, run, tiny_checkpoint
from tests.test_house import BLOCK, HEAVY

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 in all matrices, of which one is permuted in GGUF."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return tiny_checkpoint(folder, hidden_size=256, intermediate_size=256, num_hidden_layers=1)


def test_it_tells_what_it_does(tiny: Path, tmp_path: Path) -> None:
    text = ids_file(tmp_path)
    line = ("calibrate", tiny, "--text", text, "-o", tmp_path / "s", "--window", "64", "--tokens", "1024")
    first = call(*line)
    assert (first.code, first.out) == (0, f"{tmp_path / 's'}\n")
    assert first.err == "16 windows of 64 tokens from ids-0.npy (2,048 tokens)\n"
    again = call(*line, "--json")
    assert again.code == 0
    assert f"{tmp_path / 's'} already holds these statistics; nothing to do\n" in again.err
    facts = json.loads(again.out)
    found = open_statistics(tmp_path / "s", open_checkpoint(tiny))
    assert facts["tokens"] == 1024 == found.manifest.tokens
    assert facts["sources"] == [vars(found.manifest.sources[0])]
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "s").iterdir())
    assert_refused(call(*line, "--seed", "3"), tmp_path / "s", "--seed 0, not 3", "--force")
    replaced = call(*line, "--seed", "3", "--force")
    assert replaced.code == 0
    short = call(*line[:-1], "4096", "--force")
    assert "note: that is 2,048 tokens of the 4,096 requested" in short.err


def test_it_goes_on(tiny: Path, tmp_path: Path) -> None:
    line = ("calibrate", tiny, "--text", ids_file(tmp_path), "-o", tmp_path / "s", "--window", "64")
    assert call(*line).code == 0
    (tmp_path / "s" / "head.safetensors").unlink()
    assert "resuming after 1 of 1 layers" in call(*line).err


def test_refusals(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    for argv, words in (
        (("--text", tmp_path / "nothing.txt"), ("nothing.txt: No such file",)),
        (("--window", "600"), ("--window 600: must be between 4 and the model's 512",)),
        (("--tokens", "100"), ("--tokens 100: is less than one window of 512",)),
    ):
        assert_refused(call("calibrate", tiny, "-o", out, *argv), *words)
        assert not out.exists()
    short = ("--text", ids_file(tmp_path, 100))
    assert_refused(call("calibrate", tiny, "-o", out, *short), "fewer tokens than one window of 512", "--window")
    assert not out.exists(), "nothing is left of it"
    (tmp_path / "x").write_text("")
    assert_refused(call("calibrate", tiny, "-o", out, "--imatrix", tmp_path / "x"), "x: exists already")
    assert_refused(call("calibrate", tiny, "-o", tmp_path), "holds", "which is not a statistic", "-o")
    assert_refused(call("calibrate", tiny, "-o", tmp_path / "x"), "x: is not a folder")


def test_without_torch(tiny: Path, tmp_path: Path) -> None:
    """A wall of a finder that knows no torch: the line that installs it, and no folder."""
    code = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "real = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *a, **k: None if name.split('.')[0] == 'torch' else real(name, *a, **k)\n"
        "from smolexport.cli import main\n"
        "sys.stderr = sys.stdout\n"
        "try:\n    main(['calibrate', sys.argv[1], '-o', sys.argv[2]])\nexcept SystemExit as end:\n    print(end.code)"
    )
    line, status = python(code, str(tiny), str(tmp_path / "s")).splitlines()
    assert line == "smolexport: the runtime torch needs torch: pip install torch transformers"
    assert status == "2"
    assert not (tmp_path / "s").exists()


def test_statistics_are_read_without_torch(tiny: Path, tmp_path: Path) -> None:
    assert call("calibrate", tiny, "--text", ids_file(tmp_path), "-o", tmp_path / "s", "--window", "64").code == 0
    code = BLOCK.format(blocked=HEAVY) + (
        "from pathlib import Path\n"
        "from smolexport.calibration.statistics import open_statistics\n"
        "from smolexport.model.checkpoint import open_checkpoint\n"
        "checkpoint = open_checkpoint(Path(sys.argv[1]))\n"
        "found = open_statistics(Path(sys.argv[2]), checkpoint)\n"
        "print(*(found.hessian(t).shape[0] for t in checkpoint.spec.tensors() if len(t.shape) == 2))"
    )
    assert python(code, str(tiny), str(tmp_path / "s")).split() == ["256"] * 8


def test_the_importance_matrix(tiny: Path, tmp_path: Path) -> None:
    """llama.cpp's names, sums of squares over all positions; our GGUF export takes it as it takes llama.cpp's."""
    file = tmp_path / "x.imatrix.gguf"
    done = call(
        "calibrate", tiny, "--text", ids_file(tmp_path), "-o", tmp_path / "s", "--window", "64", "--imatrix", file
    )
    assert done.code == 0, done.err
    assert f"wrote {file}" in done.err
    found, opened = read_imatrix(file), open_checkpoint(tiny)
    assert (found.datasets, found.chunks, found.chunk_size) == (("ids-0.npy",), 32, 64)
    stats = open_statistics(tmp_path / "s", opened)
    matrices = [t for t in opened.spec.tensors() if t.layer is not None and len(t.shape) == 2]
    assert found.entries.keys() == {output_name(t) for t in matrices}
    for tensor in matrices:
        entry = found.entries[output_name(tensor)]
        assert entry.counts.tolist() == [2048]
        np.testing.assert_allclose(entry.importance(), stats.mean_squares(tensor), rtol=1e-6)
    job = prepare("gguf", tiny, tmp_path / "x.gguf", quant="q4_k", options={"imatrix": str(file)})
    weighed = {entry.name for entry in job.plan.entries if entry.importance is not None}
    assert weighed == {output_name(t) for t in matrices}
    assert call("gguf", tiny, "-q", "q4_k", "--imatrix", file, "-o", tmp_path / "x.gguf").code == 0
    assert call("gguf", tiny, "-q", "q4_k", "-o", tmp_path / "y.gguf").code == 0
    assert (tmp_path / "x.gguf").read_bytes() != (tmp_path / "y.gguf").read_bytes()


def test_the_importance_matrix_is_that_of_llama_cpps_tool(demo: Path, tmp_path: Path) -> None:
    """The demo model writes; the last layer's figures are those of its own run in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    file = tmp_path / "x.gguf"
    done = run("calibrate", demo, "-o", tmp_path / "s", "--window", "64", "--tokens", "512", "--imatrix", file)
    assert done.code == 0, done.err
    assert "8 windows of 64 tokens from written by the model (512 tokens)" in done.err
    windows = open_statistics(tmp_path / "s").windows()
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()
    seen = []
    model.model.layers[-1].mlp.down_proj.register_forward_hook(lambda _m, args, _o: seen.append(args[0].double()))
    with torch.inference_mode():
        model(torch.from_numpy(windows.astype(np.int64)))
    last = len(model.model.layers) - 1
    entry = read_imatrix(file).entries[f"blk.{last}.ffn_down.weight"]
    np.testing.assert_allclose(entry.sums[0], seen[0].square().sum((0, 1)).numpy(), rtol=1e-4)

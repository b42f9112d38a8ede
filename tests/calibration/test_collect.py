"""Statistics are those that hooks on transformers' own model gather; a kill costs a layer at most, and no byte."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.calibration.collect import Collection, collect, open_collection
from smolexport.calibration.statistics import Statistics, input_of, open_statistics
from smolexport.calibration.trainer import ActivationStats
from smolexport.errors import CalibrationError, OutputError, UsageError
from smolexport.model.checkpoint import Checkpoint, open_checkpoint
from smolexport.model.spec import Role
from tests.calibration.models import CASES, FAMILIES, ids_file, made
from tests.cli.commands import environment, tiny_checkpoint

torch = pytest.importorskip("torch")

WINDOW = 64


def gathered(checkpoint: Checkpoint, folder: Path, tokens: int = 2048, **options: Any) -> Statistics:
    texts = [ids_file(folder, tokens)]
    return collect(open_collection(checkpoint, folder / "stats", texts=texts, tokens=tokens, window=WINDOW, **options))


def hooked(checkpoint: Checkpoint, windows: NDArray[np.int32]) -> tuple[dict[str, Any], Any]:
    """By module, what transformers' linear layers read, in float64 [n, w, c]; and the log-probabilities [n, w, v]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _m, args, _out, name=name: seen.update({name: args[0].double()}))
    with torch.inference_mode():
        logits = model(torch.from_numpy(windows.astype(np.int64))).logits
    return seen, torch.log_softmax(logits.double(), -1).numpy()


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("case", CASES)
def test_moments_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    checkpoint = made(tmp_path, case)
    found = gathered(checkpoint, tmp_path)
    windows = found.windows()
    assert windows.shape == (32, WINDOW)
    seen, log_probs = hooked(checkpoint, windows)
    checked = 0
    for tensor in checkpoint.spec.tensors():
        if len(tensor.shape) != 2:
            continue
        name = "lm_head" if tensor.role in (Role.EMBED, Role.HEAD) else tensor.stored_name.removesuffix(".weight")
        x = seen[name]
        rows = x[:, 1:].reshape(-1, x.shape[-1])
        wanted = (rows.T @ rows / len(rows)).numpy()
        hessian = found.hessian(tensor)
        assert hessian.dtype == np.float32
        assert np.array_equal(hessian, hessian.T)
        assert np.linalg.norm(hessian - wanted) < 1e-5 * np.linalg.norm(wanted), tensor.stored_name
        squares = (x * x).mean((0, 1)).numpy()
        np.testing.assert_allclose(found.mean_squares(tensor), squares, rtol=1e-4)
        sizes = (rows * rows).sum(1)
        assert found.largest_share(tensor) == pytest.approx(float(sizes.max() / sizes.sum()), rel=1e-3)
        checked += 1
    assert checked == 7 * len(checkpoint.spec.layers) + (1 if checkpoint.spec.tied else 2)
    teacher = found.teacher()
    assert teacher.ids.shape == (32, WINDOW, 256)
    picked = np.take_along_axis(log_probs, teacher.ids.astype(np.int64), -1)
    assert np.abs(picked - teacher.log_probs).max() < 2e-4
    assert (np.diff(teacher.log_probs) <= 0).all()
    np.testing.assert_allclose(picked[..., 0], log_probs.max(-1))
    part = found.teacher(3)
    assert np.array_equal(part.ids, teacher.ids[3:])
    assert np.array_equal(part.log_probs, teacher.log_probs[3:])


def test_nothing_but_the_statistics_is_left(tmp_path: Path) -> None:
    checkpoint = made(tmp_path, "llama")
    found = gathered(checkpoint, tmp_path)
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "head.safetensors", "layer-000.safetensors", "layer-001.safetensors", "manifest.json", "teacher.safetensors",
        "tokens.safetensors",
    ]  # fmt: skip
    manifest = json.loads((found.folder / "manifest.json").read_text())
    assert manifest["sources"][0]["tokens"] == 2048
    assert manifest["sources"][0]["sha256"] == hashlib.sha256((tmp_path / "ids-0.npy").read_bytes()).hexdigest()
    assert set(manifest["versions"]) == {"smolexport", "torch"}
    before = digests(found.folder)
    gathered(checkpoint, tmp_path)  # nothing is left to do
    assert digests(found.folder) == before
    first, second = (next(t for t in checkpoint.spec.tensors() if t.role is role) for role in (Role.Q, Role.V))
    assert input_of(first) == input_of(second)


KILLED = """
import sys
from pathlib import Path
from smolexport.calibration import collect as c
from smolexport.model.checkpoint import open_checkpoint
print("ready", flush=True)
folder, text, out, window = sys.argv[1:]
job = c.open_collection(open_checkpoint(Path(folder)), Path(out), texts=[Path(text)], tokens=12288, window=int(window))
c.collect(job)
"""


@pytest.mark.parametrize("moment", ["layer-000", "layer-002", "layer-005", "teacher"])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(moment: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "smollm3", num_hidden_layers=6)
    text = ids_file(tmp_path, 12288)
    checkpoint = open_checkpoint(folder)
    whole = collect(open_collection(checkpoint, tmp_path / "whole", texts=[text], tokens=12288, window=WINDOW))
    out = tmp_path / "killed"
    argv = [sys.executable, "-c", KILLED, str(folder), str(text), str(out), str(WINDOW)]
    child = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not any(moment in path.name for path in (out.iterdir() if out.is_dir() else ())):
        assert child.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    if child.stdout:
        child.stdout.close()
    job = open_collection(checkpoint, out, texts=[text], tokens=12288, window=WINDOW)
    assert not job.done
    assert job.layers_done >= (0 if moment == "teacher" else int(moment[-3:]))
    ran: list[int] = []
    collect(spied(job, ran))
    # The last layer's file may have been whole when the kill came, and the head under way.
    assert ran == list(range(job.manifest.layers - len(ran), job.manifest.layers))
    assert ran or moment in ("layer-005", "teacher")
    assert len(ran) <= 6 - (6 if moment == "teacher" else int(moment[-3:]))
    assert digests(out) == digests(whole.folder)


def spied(job: Collection, ran: list[int]) -> Collection:
    """`job` with an engine that notes which layers it ran."""
    from dataclasses import replace

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(job.engine, name)

        def layer(self, index: int, *arguments: Any) -> Mapping[str, ActivationStats]:
            ran.append(index)
            return job.engine.layer(index, *arguments)

    engine: Any = Spy()
    return replace(job, engine=engine)


def test_without_the_hidden_states_all_layers_are_run_again(tmp_path: Path) -> None:
    checkpoint = made(tmp_path, "llama")
    found = gathered(checkpoint, tmp_path)
    before = digests(found.folder)
    (found.folder / "layer-001.safetensors").unlink()
    (found.folder / "hidden-1.f32").write_bytes(b"short")
    assert digests(gathered(checkpoint, tmp_path).folder) == before


def test_the_number_of_windows_at_a_time_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smolexport_on_torch import _collect

    checkpoint = made(tmp_path, "qwen2, biases")
    found = gathered(checkpoint, tmp_path)
    tensors = [t for t in checkpoint.spec.tensors() if len(t.shape) == 2]
    first = [found.hessian(t) for t in tensors]
    monkeypatch.setattr(_collect, "BATCH", 3 * WINDOW)
    monkeypatch.setattr(_collect, "STRIP", 48)
    again = gathered(checkpoint, tmp_path, force=True)
    for tensor, hessian in zip(tensors, first, strict=True):
        other = again.hessian(tensor)
        assert np.linalg.norm(other - hessian) < 3e-6 * np.linalg.norm(hessian), tensor.stored_name


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    checkpoint = made(tmp_path, "llama")
    found = gathered(checkpoint, tmp_path)
    text, folder = tmp_path / "ids-0.npy", found.folder
    same: dict[str, Any] = {"texts": [text], "tokens": 2048, "window": WINDOW}
    for changed, said in (
        ({"tokens": 1024}, "--tokens 2048, not 1024"),
        ({"window": 32, "seed": 1}, "--window 64, not 32; --seed 0, not 1"),
        ({"texts": [ids_file(tmp_path, seed=1)]}, r"other --text files \(ids-0.npy\)"),
        ({"texts": []}, "method text, not self"),
    ):
        with pytest.raises(CalibrationError, match=said):
            open_collection(checkpoint, folder, **{**same, **changed})
    other = open_checkpoint(tiny_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(CalibrationError, match="another checkpoint"):
        open_collection(other, folder, **same)
    with pytest.raises(CalibrationError, match="holds statistics of another checkpoint than"):
        open_statistics(folder, other)
    assert open_statistics(folder, checkpoint).manifest == found.manifest
    done = collect(open_collection(checkpoint, folder, **{**same, "tokens": 1024}, force=True))
    assert done.manifest.tokens == 1024
    (folder / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match=r"holds mine\.txt, which is not a statistic"):
        open_collection(checkpoint, folder, **same, force=True)
    with pytest.raises(OutputError, match="holds"):
        open_collection(checkpoint, checkpoint.folder, **same, force=True)


def test_windows_that_cannot_be(tmp_path: Path) -> None:
    checkpoint = made(tmp_path, "llama")
    text = ids_file(tmp_path, 100)
    for options, said in (({"window": 513}, "--window 513: must be between 4 and the model's 512"),
                          ({"window": 64, "tokens": 32}, "--tokens 32: is less than one window of 64")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            open_collection(checkpoint, tmp_path / "s", texts=[text], **options)
    with pytest.raises(CalibrationError, match="fewer tokens than one window of 512"):
        open_collection(checkpoint, tmp_path / "s", texts=[text])
    with pytest.raises(UsageError, match=r"nothing\.txt: No such file"):
        open_collection(checkpoint, tmp_path / "s", texts=[tmp_path / "nothing.txt"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_writes_its_own_text(family: str, tmp_path: Path) -> None:
    from smolexport_on_torch import _collect

    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, family))
    written: list[int] = []
    job = open_collection(checkpoint, tmp_path / "a", tokens=32 * 48, window=48, progress=written.append)
    windows = Statistics(job.folder, job.manifest).windows()
    assert windows.shape == (32, 48)
    assert sum(written) == windows.size == job.manifest.sources[0].tokens
    assert job.manifest.method == "self"
    _, log_probs = hooked(checkpoint, windows)
    nats = -np.take_along_axis(log_probs[:, :-1], windows[:, 1:, None].astype(np.int64), -1)
    entropy = -(np.exp(log_probs) * log_probs).sum(-1)[:, :-1]
    # Drawn from the model at temperature 1: what it is surprised by is its entropy, up to the noise of the draw.
    assert abs(nats.mean() - entropy.mean()) < 5 * nats.std() / np.sqrt(nats.size)
    assert windows[:, 0].min() >= 3, "no special token comes first"
    assert len(set(windows[:, 0])) > 20
    again = open_collection(checkpoint, tmp_path / "b", tokens=32 * 48, window=48)
    assert again.manifest == job.manifest
    other = open_collection(checkpoint, tmp_path / "c", tokens=32 * 48, window=48, seed=1)
    assert other.manifest.sha256 != job.manifest.sha256
    with pytest.MonkeyPatch.context() as patch:  # layers that are read again for each token, some windows at a time
        patch.setattr(_collect, "KEPT", 0)
        streamed = open_collection(checkpoint, tmp_path / "d", tokens=32 * 48, window=48)
    assert streamed.manifest.sha256 == job.manifest.sha256


CHILD = """
import sys
from pathlib import Path
from smolexport.calibration.collect import collect, open_collection
from smolexport.model.checkpoint import open_checkpoint
from smolexport.parity.peak_memory import peak_rss
import torch, numpy.random
from smolexport_on_torch import trainer
before = peak_rss()
folder, text, out, tokens = sys.argv[1:]
collect(open_collection(open_checkpoint(Path(folder)), Path(out), texts=[Path(text)], tokens=int(tokens), window=128))
print(peak_rss() - before)
"""


def test_memory_grows_neither_with_text_nor_with_layers(tmp_path: Path) -> None:
    from tests.children import python

    # 2 MB of hidden states per 2048 tokens, 15 MB of float32 per layer.
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 320}
    small = tiny_checkpoint(tmp_path / "small", num_hidden_layers=2, **wide)
    deep = tiny_checkpoint(tmp_path / "deep", num_hidden_layers=12, **wide)
    text = ids_file(tmp_path, 32768)
    few, many, deeper = (
        int(python(CHILD, str(folder), str(text), str(tmp_path / f"out-{i}"), str(tokens)))
        for i, (folder, tokens) in enumerate(((small, 4096), (small, 32768), (deep, 4096)))
    )
    assert few < 150e6
    assert many < few + 15e6, "32,768 tokens have 32 MB of hidden states"
    assert deeper < few + 20e6, "ten more layers have 40 MB of weights and 30 MB of Hessians"

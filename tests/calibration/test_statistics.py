"""A damaged folder of statistics is refused in one line that names the file and the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolexport.calibration.collect import collect, open_collection
from smolexport.calibration.files import STRIP, open_arrays, triangle_rows, triangle_size, write_arrays
from smolexport.calibration.statistics import Statistics, input_of, open_statistics
from smolexport.errors import CalibrationError
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.spec import Role, Tensor
from tests.calibration.models import ids_file, made

pytest.importorskip("torch")

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return made(tmp_path_factory.mktemp("checkpoint"), "llama")


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    text = ids_file(folder)
    return collect(open_collection(checkpoint, folder / "stats", texts=[text], tokens=2048, window=64)).folder


@pytest.fixture
def stats(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "stats"))


def tensor_of(checkpoint: Checkpoint, source: str = DOWN) -> Tensor:
    return next(t for t in checkpoint.spec.tensors() if t.stored_name == source)


def read_all(folder: Path, checkpoint: Checkpoint) -> None:
    found = open_statistics(folder, checkpoint)
    found.windows()
    for tensor in checkpoint.spec.tensors():
        if len(tensor.shape) == 2:
            found.hessian(tensor)
            found.mean_squares(tensor)
            found.largest_share(tensor)
    found.teacher()


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The file with other arrays."""
    file = open_arrays(path, "a test")
    arrays: dict[str, Any] = {name: file.rows(name, 0, shape[0]) for name, (_, shape, _) in file.places.items()}
    change(arrays)
    shapes = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    write_arrays(path, shapes, [arrays[name].reshape(-1) for name in shapes], file.metadata)


def nan(name: str, at: int) -> Callable[[dict[str, Any]], object]:
    return lambda arrays: arrays[name].reshape(-1).__setitem__(at, np.nan)


def test_a_whole_folder_is_read(whole: Path, checkpoint: Checkpoint) -> None:
    read_all(whole, checkpoint)


LAYER = "layer-001.safetensors"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "no layer": (LAYER, Path.unlink, (LAYER, "not found", "layers.1.")),
    "a cut layer": (LAYER, lambda p: p.write_bytes(p.read_bytes()[:-100]), (LAYER, "is damaged", "layers.1.")),
    "an empty layer": (LAYER, lambda p: p.write_bytes(b""), (LAYER, "is damaged", "layers.1.")),
    "a layer of noise": (LAYER, lambda p: p.write_bytes(b"\x91" * 5000), (LAYER, "is damaged", "layers.1.")),
    "a folder": (LAYER, lambda p: (p.unlink(), p.mkdir()), (LAYER, "layers.1.")),
    "no such array": (LAYER, lambda p: rewrite(p, lambda a: a.pop("down.hessian")), (LAYER, "down.hessian", DOWN)),
    "another shape": (
        LAYER, lambda p: rewrite(p, lambda a: a.update({"down.hessian": a["attn.hessian"]})),
        (LAYER, "down.hessian is float32 [2080]", DOWN, "needs float32 [12880]"),
    ),
    "other numbers": (
        LAYER, lambda p: rewrite(p, lambda a: a.update({"down.hessian": np.ones(triangle_size(160), np.int32)})),
        (LAYER, "down.hessian is int32", DOWN),
    ),
    "short mean squares": (
        LAYER, lambda p: rewrite(p, lambda a: a.update({"down.mean_squares": np.ones(3, np.float32)})),
        (LAYER, "down.mean_squares is float32 [3]", DOWN),
    ),
    "nan in a Hessian": (LAYER, lambda p: rewrite(p, nan("down.hessian", 500)), (LAYER, "not finite", DOWN)),
    "nan in mean squares": (LAYER, lambda p: rewrite(p, nan("down.mean_squares", 5)), (LAYER, "mean_squares", DOWN)),
    "negative mean squares": (
        LAYER, lambda p: rewrite(p, lambda a: a["o.mean_squares"].__setitem__(0, -1)), (LAYER, "o.mean_squares"),
    ),
    "no head": ("head.safetensors", Path.unlink, ("head.safetensors", "not found", "model.embed_tokens.weight")),
    "no teacher": ("teacher.safetensors", Path.unlink, ("teacher.safetensors", "not found", "predictions")),
    "nan in the teacher": (
        "teacher.safetensors", lambda p: rewrite(p, nan("log_probs", 9)), ("teacher.safetensors", "not finite"),
    ),
    "a short teacher": (
        "teacher.safetensors", lambda p: rewrite(p, lambda a: a.update(ids=a["ids"][:3])),
        ("teacher.safetensors", "ids is int32 [3, 64, 256]"),
    ),
    "no tokens": ("tokens.safetensors", Path.unlink, ("tokens.safetensors", "not found")),
    "other tokens": (
        "tokens.safetensors", lambda p: rewrite(p, lambda a: a["tokens"].__setitem__((0, 0), 9)),
        ("tokens.safetensors", "other tokens"),
    ),
    "no manifest": ("manifest.json", Path.unlink, ("manifest.json", "not found")),
    "a cut manifest": ("manifest.json", lambda p: p.write_bytes(p.read_bytes()[:-9]), ("manifest.json",)),
    "a manifest of a later form": (
        "manifest.json", lambda p: p.write_text(json.dumps({**json.loads(p.read_text()), "form": 2})),
        ("manifest.json", "not of this version"),
    ),
    "a list": ("manifest.json", lambda p: p.write_text("[]"), ("manifest.json",)),
    "a manifest of words": (
        "manifest.json", lambda p: p.write_text(json.dumps({**json.loads(p.read_text()), "windows": "many"})),
        ("manifest.json", "windows is 'many'"),
    ),
    "windows below zero": (
        "manifest.json", lambda p: p.write_text(json.dumps({**json.loads(p.read_text()), "windows": -1})),
        ("manifest.json", "windows is -1"),
    ),
    "sources of nothing": (
        "manifest.json", lambda p: p.write_text(json.dumps({**json.loads(p.read_text()), "sources": [3]})),
        ("manifest.json", "sources"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, stats: Path, checkpoint: Checkpoint) -> None:
    name, harm, words = DAMAGE[case]
    harm(stats / name)
    with pytest.raises(CalibrationError) as caught:
        read_all(stats, checkpoint)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_is_mended_by_another_run(stats: Path, whole: Path, checkpoint: Checkpoint) -> None:
    (stats / LAYER).write_bytes(b"")
    text = ids_file(stats.parent)
    collect(open_collection(checkpoint, stats, texts=[text], tokens=2048, window=64))
    for path in whole.iterdir():
        assert (stats / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_has_no_statistic(whole: Path, checkpoint: Checkpoint) -> None:
    found = Statistics(whole, open_statistics(whole).manifest)
    norm = tensor_of(checkpoint, "model.norm.weight")
    with pytest.raises(CalibrationError, match=r"model\.norm\.weight: is not a matrix"):
        found.hessian(norm)
    with pytest.raises(CalibrationError, match=r"q_proj\.bias: is not a matrix"):
        input_of(Tensor(Role.Q, (0,), "bias", (64,)))
    assert input_of(tensor_of(checkpoint)).kind == "down"


@pytest.mark.parametrize("columns", [1, 2, 40, STRIP, STRIP + 1, 2 * STRIP + 76])
def test_triangles(columns: int, tmp_path: Path) -> None:
    full = np.random.default_rng(columns).normal(size=(columns, columns)).astype(np.float32)
    full = full + full.T
    shapes = {"x": ("float32", (3,)), "h": ("float32", (triangle_size(columns),))}
    write_arrays(tmp_path / "a", shapes, [np.ones(3, np.float32), *triangle_rows(full)])
    assert np.array_equal(open_arrays(tmp_path / "a", "a test").symmetric("h", columns), full)

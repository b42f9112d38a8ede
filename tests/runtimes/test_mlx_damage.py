"""The MLX runtime on damaged and hostile folders: one clear line, no code run, no memory taken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.errors import CheckpointError, FileFormatError, SmolexportError, UnsupportedError, UsageError
from smolexport.model.arch import load_spec
from smolexport.testing.checkpoints import random_tensors, write_checkpoint, write_safetensors
from tests import mlx_for_tests
from tests.damage import join, split

mx = pytest.importorskip("mlx.core", reason="the mlx extra is not installed")

import smolexport_on_mlx  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mlx") / "llama", "llama", num_hidden_layers=2)


def change_config(folder: Path, **changes: object) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def replace_tensors(folder: Path, **changes: NDArray[Any] | None) -> None:
    tensors = dict(random_tensors(load_spec(json.loads((folder / "config.json").read_text())), dtype="bf16"))
    for name, array in changes.items():
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = array
    write_safetensors(folder / "model.safetensors", tensors)


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, data = split(file)
    change(header)
    join(file, header, data)


def write_trap(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'sprung')!r}, 'w')\n")
    change_config(folder, model_file="evil.py")


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.npz")


def cut_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def overflow(header: dict[str, Any]) -> None:
    header["model.norm.weight"] = {"dtype": "F32", "shape": [65536] * 4, "data_offsets": [0, 0]}


Q4 = {"group_size": 64, "bits": 4}
NORM = "model.norm.weight"
DAMAGES: list[tuple[Callable[[Path], object], type[SmolexportError], str]] = [
    (lambda f: (f / "config.json").unlink(), CheckpointError, "config.json"),
    (lambda f: (f / "config.json").write_text("{"), CheckpointError, "JSON"),
    (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "object"),
    (lambda f: (f / "generation_config.json").write_text("[]"), FileFormatError, "cannot load"),
    (lambda f: (f / "model.safetensors").unlink(), FileFormatError, "no tensors"),
    (only_pickles, FileFormatError, "never opened"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), FileFormatError, "damaged"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), FileFormatError, "damaged"),
    (cut_short, FileFormatError, "damaged"),
    (lambda f: rewrite_header(f / "model.safetensors", overflow), FileFormatError, "damaged"),
    (lambda f: shutil.copy(f / "model.safetensors", f / "model-2.safetensors"), FileFormatError, "is in model"),
    (lambda f: replace_tensors(f, **{NORM: None}), FileFormatError, NORM),
    (lambda f: replace_tensors(f, stray=np.zeros(4, np.float32)), FileFormatError, "stray"),
    (lambda f: replace_tensors(f, **{NORM: np.zeros(9, np.float32)}), FileFormatError, NORM),
    (lambda f: change_config(f, model_type="gpt9"), FileFormatError, "gpt9"),
    (lambda f: change_config(f, model_type="..cache"), FileFormatError, "model_type"),
    (lambda f: change_config(f, quantization={"group_size": 64}), FileFormatError, "bits"),
    (lambda f: change_config(f, quantization={**Q4, "model.layers.0.mlp.up_proj": {"rm": 1}}), FileFormatError, "rm"),
    (
        lambda f: change_config(f, quantization={**Q4, "model.layers.0.mlp.up_proj": {"bits": 7}}),
        FileFormatError,
        "bits",
    ),
    (lambda f: change_config(f, num_attention_heads=0), FileFormatError, "ZeroDivision"),
    (write_trap, FileFormatError, "model_file"),
]


@pytest.mark.parametrize(("damage", "error", "said"), DAMAGES, ids=[str(i) for i in range(len(DAMAGES))])
def test_a_damaged_folder_is_one_clear_line(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], object], error: type[SmolexportError], said: str
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    damage(folder)
    with pytest.raises(error, match=said) as caught:
        smolexport_on_mlx.open(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**9},
        {"vocab_size": 10**30},
        {"hidden_size": 2**30},
        {"intermediate_size": 2**30, "quantization": {"group_size": 64, "bits": 4}},
        {"head_dim": 2**30},
        {"num_hidden_layers": "many"},
    ],
    ids=str,
)
def test_sizes_that_the_files_do_not_hold_cost_no_memory(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "hostile"))
    change_config(folder, **changes)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with pytest.raises(FileFormatError):
        smolexport_on_mlx.open(folder)
    assert mx.get_peak_memory() - before < 1 << 20


def test_codes_in_the_place_of_numbers(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "codes"))

    def change(header: dict[str, Any]) -> None:
        header["model.layers.0.mlp.up_proj.weight"]["dtype"] = "I16"

    rewrite_header(folder / "model.safetensors", change)
    with pytest.raises(FileFormatError, match=r"up_proj\.weight.*int16"):
        smolexport_on_mlx.open(folder)


def test_folders_that_mlx_lm_cannot_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model [int4]"))
    with pytest.raises(UsageError, match="rename"):
        smolexport_on_mlx.open(folder)


def test_a_state_that_cannot_be_rewound(tmp_path: Path) -> None:
    utils, mamba = mlx_for_tests.mlx_lm("utils"), mlx_for_tests.mlx_lm("models.mamba")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "state_size": 8, "num_hidden_layers": 1}
    switches = {"conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
    config = {"model_type": "mamba", **sizes, **switches, "tie_word_embeddings": True}
    utils.save_model(tmp_path, mamba.Model(mamba.ModelArgs(**config)))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="rewound"):
        smolexport_on_mlx.open(tmp_path)

"""Reading sound checkpoints: every storage type and layout, and what is left out on purpose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.errors import CheckpointError, UsageError
from smolexport.model.arch import architectures
from smolexport.model.checkpoint import find_checkpoint, open_checkpoint
from smolexport.model.spec import Role
from smolexport.testing.checkpoints import random_tensors, write_safetensors
from tests.cli.commands import tiny_checkpoint
from tests.damage import join, split

SINGLE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path)


@pytest.mark.parametrize("model_type", architectures())
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_every_tensor_comes_back(model_type: str, shards: int, dtype: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, model_type, shards=shards, dtype=dtype)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype == dtype.upper()
    expected = dict(random_tensors(checkpoint.spec, dtype=dtype))
    assert [t.stored_name for t in checkpoint.stored] == list(expected)
    for tensor, place in checkpoint.stored.items():
        np.testing.assert_array_equal(place.read_rows().reshape(tensor.shape), expected[tensor.stored_name])
    assert checkpoint.nbytes == sum(a.nbytes for a in expected.values())


def test_rows_are_read_alone(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    embed = next(place for tensor, place in checkpoint.stored.items() if tensor.role is Role.EMBED)
    whole = embed.read_rows()
    assert whole.dtype == ml_dtypes.bfloat16
    for start, stop in [(0, 1), (7, 12), (319, 320), (5, 5)]:
        np.testing.assert_array_equal(embed.read_rows(start, stop), whole[start:stop])


def test_safetensors_own_writer_and_ours_agree(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    arrays: dict[str, NDArray[Any]] = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(4, np.float16)}
    write_safetensors(tmp_path / "ours", arrays)
    save_file(arrays, tmp_path / "theirs")
    for file in ("ours", "theirs"):
        for name, array in load_file(tmp_path / file).items():
            np.testing.assert_array_equal(array, arrays[name])


def test_a_checkpoint_that_transformers_saved(folder: Path, tmp_path: Path) -> None:
    """The reference library's own files, config included, read the same as ours."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    ours, theirs = open_checkpoint(folder), open_checkpoint(tmp_path / "saved")
    assert ours.spec == theirs.spec
    for tensor, place in ours.stored.items():
        np.testing.assert_array_equal(place.read_rows(), theirs.stored[tensor].read_rows())


def test_mixed_storage_types(folder: Path) -> None:
    spec = open_checkpoint(folder).spec
    arrays = {n: a.astype(np.float32 if a.ndim == 1 else np.float16) for n, a in random_tensors(spec)}
    write_safetensors(folder / SINGLE, arrays)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype == "F16"
    assert {p.dtype.name for p in checkpoint.stored.values()} == {"float16", "float32"}


def test_stray_equal_head_is_dropped(folder: Path) -> None:
    """An older transformers saved the tied head too, sometimes in another storage type."""
    spec = open_checkpoint(folder).spec
    arrays = dict(random_tensors(spec, dtype="bf16"))
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].astype(np.float32)
    write_safetensors(folder / SINGLE, arrays)
    assert not any(t.role is Role.HEAD for t in open_checkpoint(folder).stored)


def test_computed_buffers_are_skipped(folder: Path) -> None:
    header, data = split(folder / SINGLE)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    header[name] = {"dtype": "F64", "shape": [8], "data_offsets": [len(data), len(data) + 64]}
    join(folder / SINGLE, header, data + bytes(64))
    assert name not in {p.name for p in open_checkpoint(folder).stored.values()}


def test_untied_head_is_a_tensor(tmp_path: Path) -> None:
    stored = open_checkpoint(tiny_checkpoint(tmp_path, tie_word_embeddings=False)).stored
    assert [t.stored_name for t in stored][-1] == "lm_head.weight"


def test_weights_that_change_underfoot(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    place = list(checkpoint.stored.values())[-1]
    raw = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(raw[:-2])
    with pytest.raises(CheckpointError, match=f"ends inside the tensor {place.name}"):
        place.read_rows()
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=f"reading the tensor {place.name}: No such file"):
        place.read_rows()


def test_links_into_the_blobs_of_a_download_are_followed(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    stored = len(open_checkpoint(folder).stored)
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert len(open_checkpoint(snapshot).stored) == stored


def test_ignored_keys(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "key_of_tomorrow": 1}))
    with pytest.raises(CheckpointError, match="--ignore-config key_of_tomorrow"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, ignore_config=["key_of_tomorrow"]).spec.model_type == "llama"


def test_finding_folders_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder wins over a hub id; beside a checkpoint folder of that name the word demo could mean either."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "owner" / "name")
    shutil.copytree(folder, tmp_path / "demo")
    assert find_checkpoint("owner/name") == Path("owner/name")
    assert find_checkpoint("./demo") == Path("demo")
    with pytest.raises(UsageError, match=r"say \./demo"):
        find_checkpoint("demo")
    assert find_checkpoint(folder) == folder


def test_an_empty_name_is_not_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="the name of the checkpoint is empty"):
        find_checkpoint("")
    assert find_checkpoint(".") == Path()


def test_the_word_demo(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("demo") == demo
    checkpoint = open_checkpoint(demo)
    assert (checkpoint.spec.model_type, checkpoint.dtype) == ("llama", "BF16")
    assert checkpoint.nbytes < 9e6

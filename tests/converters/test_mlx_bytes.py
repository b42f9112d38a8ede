"""Whole folders beside those of `mlx_lm.convert`: every array equal to the byte, and the same model when loaded.

The quantizer itself is compared in tests/core/quant; here it is which module gets what, in which dtype and name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import smolexport
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from smolexport_to_mlx.container import StoredArray, read_arrays
from smolexport_to_mlx.lint import lint

mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
SCHEMES: Mapping[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "f16": {"dtype": "float16"},
    **{f"q{b}": {"quantize": True, "q_bits": b, "q_group_size": 64} for b in (2, 3, 4, 5, 6, 8)},
    "q4_g32": {"quantize": True, "q_bits": 4, "q_group_size": 32},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4"},
    "mxfp8": {"quantize": True, "q_mode": "mxfp8"},
    **{
        name: {"quantize": True, "quant_predicate": name, "q_group_size": 64}
        for name in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
    },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def content(array: StoredArray) -> tuple[str, tuple[int, ...], bytes]:
    with array.path.open("rb") as file:
        file.seek(array.offset)
        return array.dtype, array.shape, file.read(array.nbytes)


def assert_same_arrays(ours: Path, theirs: Path) -> int:
    """Every array of both folders, byte for byte; returns how many."""
    a, b = read_arrays(ours)[0], read_arrays(theirs)[0]
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert content(array) == content(b[name]), name
    return len(a)


def both(folder: Path, scheme: str, tmp_path: Path, **options: Any) -> tuple[Path, Path]:
    tmp_path.mkdir(exist_ok=True)
    ours = smolexport.export("mlx", folder, tmp_path / "ours", quant=scheme, options=options).path
    theirs = tmp_path / "theirs"
    mlx_lm.convert(str(folder), str(theirs), **SCHEMES[scheme])
    return ours, theirs


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str, tokenizer: Path, tmp_path: Path) -> None:
    """Eight layers, so that the mixed recipes have first, middle and last ones; an untied head."""
    sizes = WIDE | {"num_hidden_layers": 8, "tie_word_embeddings": False}
    folder = write_checkpoint(tmp_path / "model", "llama", seed=5, tokenizer=tokenizer, **sizes)
    ours, theirs = both(folder, scheme, tmp_path)
    assert assert_same_arrays(ours, theirs) > 70
    assert lint(ours) == []


@pytest.mark.parametrize("model_type", ["llama", "smollm3", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_architecture(model_type: str, tied: bool, tokenizer: Path, tmp_path: Path) -> None:
    sizes = WIDE | {"tie_word_embeddings": tied}
    if model_type == "llama":
        sizes |= {"attention_bias": True, "mlp_bias": True}
    folder = write_checkpoint(tmp_path / "model", model_type, seed=6, tokenizer=tokenizer, **sizes)
    ours, theirs = both(folder, "q4", tmp_path)
    assert_same_arrays(ours, theirs)
    assert lint(ours) == []


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_every_dtype(dtype: str, tokenizer: Path, tmp_path: Path) -> None:
    """The checkpoint's dtype is that of scales, biases and norms."""
    folder = write_checkpoint(tmp_path / "model", "llama", dtype=dtype, seed=7, tokenizer=tokenizer, **WIDE)
    for scheme in ("q8", "mxfp4"):
        ours, theirs = both(folder, scheme, tmp_path / scheme)
        assert_same_arrays(ours, theirs)
        assert lint(ours) == []


def test_weights_are_rounded_to_the_dtype_that_the_config_claims(tokenizer: Path, tmp_path: Path) -> None:
    """As mlx-lm does: float32 weights under a config that says bfloat16."""
    folder = write_checkpoint(tmp_path / "model", "llama", dtype="f32", seed=8, tokenizer=tokenizer, **WIDE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    ours, theirs = both(folder, "q4", tmp_path)
    assert_same_arrays(ours, theirs)


def test_another_dtype_on_request(tokenizer: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama", seed=8, tokenizer=tokenizer, **WIDE)
    ours = smolexport.export("mlx", folder, tmp_path / "ours", quant="q4", options={"dtype": "f16"}).path
    mlx_lm.convert(str(folder), str(tmp_path / "theirs"), dtype="float16", **SCHEMES["q4"])
    assert_same_arrays(ours, tmp_path / "theirs")
    assert json.loads((ours / "config.json").read_text())["torch_dtype"] == "float16"


def test_shards_as_mlx_lm_cuts_them(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files, an index that names each array's, and mlx-lm loads them."""
    from mlx_lm.utils import load_model

    from smolexport_to_mlx import container

    folder = write_checkpoint(tmp_path / "model", "llama", seed=9, tokenizer=tokenizer, **WIDE)
    whole = smolexport.export("mlx", folder, tmp_path / "whole", quant="q4").path
    monkeypatch.setattr(container, "SHARD_BYTES", 60_000)
    cut = smolexport.export("mlx", folder, tmp_path / "cut", quant="q4").path
    names = sorted(p.name for p in cut.glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert not (cut / "model.safetensors").exists()
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert {index["weight_map"][name] for name in index["weight_map"]} == set(names)
    assert_same_arrays(whole, cut)
    assert smolexport.fingerprint(whole) == smolexport.fingerprint(cut)
    assert lint(cut) == []
    load_model(cut)


def test_folders_of_mlx_lm_are_read(tokenizer: Path, tmp_path: Path) -> None:
    """Recognised, described, and decoded to what ours decode to."""
    folder = write_checkpoint(tmp_path / "model", "qwen3", seed=5, tokenizer=tokenizer, **WIDE)
    for scheme in ("q3", "nvfp4", "mixed_4_6", "bf16"):
        ours, theirs = both(folder, scheme, tmp_path / scheme)
        assert smolexport.fingerprint(ours) == smolexport.fingerprint(theirs)
        found = smolexport.inspect(theirs)
        assert (found.format, found.weights) == ("mlx", smolexport.inspect(ours).weights)
        assert found.scheme in {"affine3-g64", "nvfp4", "affine4-g64", "bf16"}

"""Whole folders beside those of `mlx_lm.convert`: every array equal to the byte, and the same model when loaded.

The quantizer itself is compared in tests/core/quant; here it is which module gets what, in which dtype and name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smolexport
import smolexport_on_mlx
from smolexport.conversion.inspect import StoredArray
from smolexport.conversion.prepare import prepare
from smolexport.errors import FileFormatError, SessionError
from smolexport.model.arch import architectures
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from smolexport_to_mlx import lint
from smolexport_to_mlx.container import read_arrays
from smolexport_to_mlx.reading import read_folder
from tests.mlx_for_tests import mlx_lm

library = mlx_lm()

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
    library.convert(str(folder), str(theirs), **SCHEMES[scheme])
    return ours, theirs


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str, tokenizer: Path, tmp_path: Path) -> None:
    """Eight layers, so that the mixed recipes have first, middle and last ones; an untied head."""
    sizes = WIDE | {"num_hidden_layers": 8, "tie_word_embeddings": False}
    folder = write_checkpoint(tmp_path / "model", "llama", seed=5, tokenizer=tokenizer, **sizes)
    ours, theirs = both(folder, scheme, tmp_path)
    assert assert_same_arrays(ours, theirs) > 70
    assert lint(ours) == []


@pytest.mark.parametrize("model_type", architectures())
@pytest.mark.parametrize("tied", [True, False])
def test_every_architecture(model_type: str, tied: bool, tokenizer: Path, tmp_path: Path) -> None:
    sizes = WIDE | {"tie_word_embeddings": tied}
    if model_type == "llama":
        sizes |= {"attention_bias": True, "mlp_bias": True}
    folder = write_checkpoint(tmp_path / "model", model_type, seed=6, tokenizer=tokenizer, **sizes)
    ours, theirs = both(folder, "q4", tmp_path)
    assert_same_arrays(ours, theirs)
    assert lint(ours) == []


HALVES: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "head_dim": 24, "num_attention_heads": 2,
                          "num_key_value_heads": 2}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_nvfp4_rows_that_are_no_multiple_of_32(tied: bool, tokenizer: Path, tmp_path: Path) -> None:
    """Rows of 48 and 80 are whole groups of 16: every linear layer as mlx-lm packs it.

    The embedding alone stays float: MLX on a CPU cannot look up a single row, so mlx-lm's own folder generates nothing.
    """
    folder = write_checkpoint(
        tmp_path / "model", "llama", seed=6, tokenizer=tokenizer, tie_word_embeddings=tied, **HALVES
    )
    ours, theirs = both(folder, "nvfp4", tmp_path)
    a, b = read_arrays(ours)[0], read_arrays(theirs)[0]
    embedding = {f"model.embed_tokens.{part}" for part in ("weight", "scales")}
    assert a.keys() | embedding == b.keys()
    for name in a.keys() - embedding:
        assert content(a[name]) == content(b[name]), name
    assert sum(array.dtype == "U8" for array in a.values()) == (28 if tied else 29)
    assert lint(ours) == []
    assert any("embed_tokens: MLX on a CPU cannot unpack its rows of 48" in line for line in lint(theirs))
    assert any("not a multiple of 32" in note for note in prepare("mlx", folder, quant="nvfp4").plan.notes)
    with smolexport_on_mlx.open(ours) as session:
        assert np.isfinite(session.append([1, 2, 3])).all()
        assert np.isfinite(session.append([4])).all()
    with smolexport_on_mlx.open(theirs) as session, pytest.raises(SessionError, match="reshape"):
        session.append([4])
    assert smolexport.inspect(theirs).scheme == "nvfp4"
    assert len(smolexport.fingerprint(theirs)) == 32


def test_an_odd_number_of_such_rows_stays_float(tokenizer: Path, tmp_path: Path) -> None:
    """mlx-lm itself fails there, and a folder with such a matrix packed would not load on a CPU."""
    sizes = HALVES | {"vocab_size": 321, "tie_word_embeddings": False}
    folder = write_checkpoint(tmp_path / "model", "llama", seed=6, tokenizer=tokenizer, **sizes)
    with pytest.raises(ValueError, match="reshape"):
        library.convert(str(folder), str(tmp_path / "theirs"), **SCHEMES["nvfp4"])
    ours = smolexport.export("mlx", folder, tmp_path / "ours", quant="nvfp4").path
    formats = {row.name: row.format for row in smolexport.inspect(ours).tensors if len(row.shape) == 2}
    floats = {name for name, form in formats.items() if form != "nvfp4"}
    assert floats == {"model.embed_tokens.weight", "lm_head.weight"}
    assert lint(ours) == []
    with smolexport_on_mlx.open(ours) as session:
        assert np.isfinite(session.append([1, 2, 3])).all()


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
    library.convert(str(folder), str(tmp_path / "theirs"), dtype="float16", **SCHEMES["q4"])
    assert_same_arrays(ours, tmp_path / "theirs")
    assert json.loads((ours / "config.json").read_text())["torch_dtype"] == "float16"


def test_shards_as_mlx_lm_cuts_them(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files, an index that names each array's, and mlx-lm loads them."""
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
    library.utils.load_model(cut)


def test_folders_of_mlx_lm_are_read(tokenizer: Path, tmp_path: Path) -> None:
    """Recognised, described, and decoded to what ours decode to."""
    folder = write_checkpoint(tmp_path / "model", "qwen3", seed=5, tokenizer=tokenizer, **WIDE)
    for scheme in ("q3", "nvfp4", "mixed_4_6", "bf16"):
        ours, theirs = both(folder, scheme, tmp_path / scheme)
        assert smolexport.fingerprint(ours) == smolexport.fingerprint(theirs)
        found = smolexport.inspect(theirs)
        assert (found.format, found.weights) == ("mlx", smolexport.inspect(ours).weights)
        assert found.scheme in {"affine3-g64", "nvfp4", "affine4-g64", "bf16"}


SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96,
                         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
ELSEWHERE: Mapping[str, dict[str, Any]] = {
    "gemma3_text": SMALL | {"head_dim": 32},
    "mixtral": SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1},  # stacks of matrices
    "mamba": SMALL | {"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4},
}


@pytest.mark.parametrize("mode", ["affine", "nvfp4"])
@pytest.mark.parametrize("model_type", ELSEWHERE)
def test_folders_of_other_architectures_are_described(model_type: str, mode: str, tmp_path: Path) -> None:
    """Names, shapes and formats of what is there; only a fingerprint needs modules that are known."""
    config = {"model_type": model_type, "tie_word_embeddings": False, **ELSEWHERE[model_type]}
    classes = mlx_lm(f"models.{model_type}")
    model = classes.Model(classes.ModelArgs.from_dict(config))
    model, config = library.utils.quantize_model(model, config, None, None, mode=mode)
    library.utils.save_model(tmp_path, model)
    library.utils.save_config(config, tmp_path / "config.json")
    found, arrays = smolexport.inspect(tmp_path), read_arrays(tmp_path)[0]
    assert found.architecture == model_type
    assert found.scheme == {"affine": "affine4-g64", "nvfp4": "nvfp4"}[mode]
    assert sum(row.nbytes for row in found.tensors) == sum(array.nbytes for array in arrays.values())
    assert found.weights == sum(prod(row.shape) for row in found.tensors)
    shapes = {row.name: row.shape for row in found.tensors}
    if model_type == "mixtral":
        assert shapes["model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight"] == (2, 128, 64)
    with pytest.raises(FileFormatError, match=r"model_type .* is not supported|not part of a known module"):
        smolexport.fingerprint(tmp_path)


def test_stacked_matrices_are_decoded(tmp_path: Path) -> None:
    """As mx.dequantize does, with the leading axes as rows."""
    mx = pytest.importorskip("mlx.core")
    parts = mx.quantize(mx.random.normal((3, 4, 64)), group_size=32, bits=4)
    arrays = dict(zip(("x.weight", "x.scales", "x.biases"), parts, strict=True))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (tmp_path / "config.json").write_text(json.dumps({"quantization": {"group_size": 32, "bits": 4}}))
    stored = read_folder(tmp_path).stored["x.weight"]
    wanted = np.array(mx.dequantize(*parts, group_size=32, bits=4)).reshape(12, 64)
    assert stored.shape == (3, 4, 64)
    assert np.array_equal(stored.read_rows(), wanted)
    assert np.array_equal(stored.read_rows(5, 7), wanted[5:7])

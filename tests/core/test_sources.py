"""Where a checkpoint keeps the rows of a tensor: fused, transposed, with a constant that is added on reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smolexport
from smolexport.errors import TensorError, UnsupportedError
from smolexport.model import checkpoint
from smolexport.model.arch import load_spec
from smolexport.model.checkpoint import open_checkpoint, read_config
from smolexport.model.spec import ModelSpec, Role, Source
from smolexport.testing.checkpoints import random_tensors, write_checkpoint, write_safetensors, write_tokenizer

LAYER = "model.layers.{}"
QKV, GATE_UP = f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.gate_up_proj"
ATTN, FC, PROJ = "transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"
# As Phi-3 fuses, as GPT-2's Conv1D stores, as Gemma's norms are written.
SOURCES: Mapping[str, Mapping[Role, Source]] = {
    "fused": {
        **dict.fromkeys((Role.Q, Role.K, Role.V), Source(QKV)),
        **dict.fromkeys((Role.GATE, Role.UP), Source(GATE_UP)),
    },
    "transposed": {
        **dict.fromkeys((Role.Q, Role.K, Role.V), Source(ATTN, transposed=True)),
        Role.O: Source("transformer.h.{}.attn.c_proj", transposed=True),
        **dict.fromkeys((Role.GATE, Role.UP), Source(FC, transposed=True)),
        Role.DOWN: Source(PROJ, transposed=True),
        Role.EMBED: Source("transformer.wte"),
    },
    "added": {
        role: Source(f"{LAYER}.{name}", added=1.0)
        for role, name in (
            (Role.NORM_BEFORE_ATTENTION, "input_layernorm"),
            (Role.NORM_BEFORE_MLP, "pre_feedforward_layernorm"),
        )
    },
}
OPTIONS: dict[str, Any] = {"attention_bias": True, "mlp_bias": True, "dtype": "f32", "seed": 3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    return write_checkpoint(folder / "plain", "llama", tokenizer=write_tokenizer(folder / "tokenizer"), **OPTIONS)


@pytest.fixture(params=SOURCES)
def moved(request: pytest.FixtureRequest, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same weights, kept as the architecture under test keeps them."""

    def read(config: Mapping[str, Any], *, strict: bool = True) -> ModelSpec:
        return replace(load_spec(config, strict=strict), sources=SOURCES[request.param])

    monkeypatch.setattr(checkpoint, "load_spec", read)
    folder = write_checkpoint(tmp_path / "moved", "llama", tokenizer=plain, **OPTIONS)
    spec = read_config(folder)[1]
    write_safetensors(folder / "model.safetensors", dict(random_tensors(spec, seed=3, dtype="f32")))
    return folder


def test_every_row_is_that_of_the_plain_checkpoint(plain: Path, moved: Path) -> None:
    there, found = open_checkpoint(moved), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load_spec", load_spec)
        expected = open_checkpoint(plain)
    assert list(there.stored) == list(expected.stored)
    assert len({place.name for place in there.stored.values()}) <= len(expected.stored)
    for tensor, place in there.stored.items():
        rows = expected.stored[tensor].read_rows()
        # What is stored less a constant is rounded once more.
        limit = 2.0**-23 * (1 + np.abs(rows).max()) if tensor.source.added else 0
        assert np.abs(place.read_rows() - rows).max() <= limit, tensor.name
        if tensor.is_matrix:
            assert np.abs(place.read_rows(3, 11) - rows[3:11]).max() <= limit
        found += tensor.stored_name != tensor.name or tensor.source != Source(tensor.name)
    assert found >= 8


@pytest.mark.parametrize("moved", ["fused", "transposed"], indirect=True)
@pytest.mark.parametrize("scheme", ["q4_0", "f32"])
def test_exports_are_the_same_to_the_byte(scheme: str, plain: Path, moved: Path, tmp_path: Path) -> None:
    one = smolexport.export("gguf", moved, tmp_path / "moved.gguf", quant=scheme, name="tiny").path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load_spec", load_spec)
        other = smolexport.export("gguf", plain, tmp_path / "plain.gguf", quant=scheme, name="tiny").path
    assert one.read_bytes() == other.read_bytes()


def test_mlx_refuses_what_its_class_reads_otherwise(moved: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"the checkpoint rearranges \S+\.(qkv_proj|c_attn|input_layernorm)"):
        smolexport.export("mlx", moved, tmp_path / "out", quant="q4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moved", ["fused"], indirect=True)
def test_a_fused_tensor_of_another_size_is_refused_by_its_name(moved: Path) -> None:
    arrays = dict(random_tensors(read_config(moved)[1], seed=3, dtype="f32"))
    name = f"{QKV.format(2)}.weight"
    arrays[name] = arrays[name][:-1]
    write_safetensors(moved / "model.safetensors", arrays)
    with pytest.raises(TensorError, match=rf"{name} has shape \[127, 64\], config.json asks for \[128, 64\]"):
        open_checkpoint(moved)

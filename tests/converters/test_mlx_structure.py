"""Is the graph that MLX computes from our folder the checkpoint's?  Against torch on the decoded weights, in float32.

A wrong rotation, norm, bias, NoPE layer or scaling shows far above rounding (relative error 1e-5).
Axes: four architectures x tied and untied x rotary scalings x biases x schemes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import smolexport
from smolexport.conversion.pipeline import export
from smolexport.errors import UnsupportedError
from smolexport.model.arch import architectures
from smolexport.model.checkpoint import open_checkpoint
from smolexport.run.generate import generate
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from tests.converters.test_gguf_structure import LLAMA3, YARN
from tests.mlx_for_tests import mlx_lm

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama llama3 factors": ("llama", {"rope_scaling": LLAMA3}),
    "llama linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama yarn": ("llama", {"rope_scaling": YARN}),
    "llama yarn, own betas and magnitude": (
        "llama",
        {"rope_scaling": YARN | {"beta_fast": 64, "beta_slow": 2, "attention_factor": 1.5}},
    ),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama untied, wide heads": ("llama", {"tie_word_embeddings": False, "head_dim": 32}),
    "mistral": ("mistral", {}),
    "mistral without a window": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "smollm3": ("smollm3", {}),
    "smollm3 untied": ("smollm3", {"tie_word_embeddings": False}),
    "smollm3 own NoPE layers": ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1, 1, 1, 0]}),
    "smollm3 yarn, mscale": ("smollm3", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}}),
    "smollm3 biases": ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3 linear": ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "qwen3 yarn": ("qwen3", {"rope_scaling": YARN}),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def play_both(checkpoint: Path, folder: Path, count: int = 96) -> float:
    """Relative error of MLX on `folder` against torch f32 on the weights decoded from it."""
    pytest.importorskip("torch")
    mlx_lm()
    import smolexport_on_mlx as mlx
    import smolexport_on_torch as torch

    back = ((t.stored_name, values) for t, values in smolexport.read_back(folder, open_checkpoint(checkpoint).spec))
    with torch.open(checkpoint, dtype="f32", threads=1, context=128, weights=back) as session:
        tokens = np.random.default_rng(3).integers(0, session.vocab_size, count)
        reference = session.append(tokens)
    with mlx.open(folder, context=128, dtype="f32") as session:
        return relative(session.append(tokens), reference)


def relative(other: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(other - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("case", CASES)
def test_mlx_computes_what_torch_computes(case: str, tokenizer: Path, tmp_path: Path) -> None:
    model_type, overrides = CASES[case]
    folder = write_checkpoint(tmp_path / "model", model_type, seed=11, tokenizer=tokenizer, **overrides)
    done = export("mlx", folder, tmp_path / "out", quant="int8" if "yarn" in case else "q4_g32")
    assert play_both(folder, done.path) < 1e-5


@pytest.mark.parametrize(
    "scheme",
    ["f32", "bf16", "f16", "int4", "q2", "q3", "q5_g32", "q6", "q8_g128", "mixed_4_6", "mxfp4", "nvfp4", "mxfp8"],
)
def test_every_kind_of_scheme(scheme: str, tokenizer: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    folder = write_checkpoint(tmp_path / "model", "llama", seed=12, tokenizer=tokenizer, **sizes)
    assert play_both(folder, export("mlx", folder, tmp_path / "out", quant=scheme).path) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_both_spellings_of_the_config_give_the_same_folder(case: str, tokenizer: Path, tmp_path: Path) -> None:
    """A config of transformers 5 alone would make mlx-lm compute with a theta of 10,000, and never say so."""
    model_type, overrides = CASES[case]
    made = []
    for old_style in (True, False):
        folder = tmp_path / str(old_style) / "model"
        write_checkpoint(folder, model_type, seed=1, tokenizer=tokenizer, old_style=old_style, **overrides)
        out = export("mlx", folder, tmp_path / f"{old_style}-out", quant="q4_g32", name="x").path
        made.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert made[0] == made[1]
    config = json.loads(made[0]["config.json"])
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_the_check_would_notice_a_lost_theta(tokenizer: Path, tmp_path: Path) -> None:
    """The tests above can fail: without the top-level key the logits are off by percents."""
    folder = write_checkpoint(tmp_path / "model", "smollm3", seed=2, tokenizer=tokenizer)
    out = export("mlx", folder, tmp_path / "out", quant="q8_g32").path
    config = json.loads((out / "config.json").read_text())
    del config["rope_theta"]
    (out / "config.json").write_text(json.dumps(config))
    assert play_both(folder, out) > 1e-3


@pytest.mark.parametrize(
    ("model_type", "overrides", "said"),
    [
        ("llama", {"rope_scaling": YARN | {"truncate": False}}, "truncate false"),
        ("qwen3", {"attention_bias": True}, "qkv_bias"),
        ("mistral", {"sliding_window": 24}, "window none, the checkpoint has 24"),
    ],
)
def test_what_mlx_would_compute_differently_is_refused(
    model_type: str, overrides: dict[str, Any], said: str, tokenizer: Path, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model", model_type, tokenizer=tokenizer, **overrides)
    with pytest.raises(UnsupportedError, match=said):
        export("mlx", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", architectures())
@pytest.mark.parametrize("tied", [True, False])
def test_mlx_lm_itself_generates_what_our_loop_does(
    model_type: str, tied: bool, tokenizer: Path, tmp_path: Path
) -> None:
    """`mlx_lm.load` takes the folder as it is; its greedy tokens are ours, in float32 on both sides."""
    import smolexport_on_mlx

    library = mlx_lm()
    folder = write_checkpoint(
        tmp_path / "model", model_type, dtype="f32", seed=13, tokenizer=tokenizer, tie_word_embeddings=tied
    )
    out = export("mlx", folder, tmp_path / "out", quant="q4_g32").path
    model, theirs = library.load(str(out))
    prompt = theirs.encode("Once upon a time")
    expected = [int(r.token) for r in library.stream_generate(model, theirs, prompt, max_tokens=24)]
    with smolexport_on_mlx.open(out) as session:
        assert session.codec.encode("Once upon a time") == prompt
        tokens = list(generate(session, "Once upon a time", max_tokens=24).tokens)
    assert tokens == expected[: len(tokens)]
    assert len(tokens) >= len(expected) - 1  # mlx-lm reports the stop token too

"""Is the graph that llama.cpp computes from our file the checkpoint's?  f32 weights, f32 cache, one thread.

A wrong rotation, norm, bias, NoPE layer or scaling shows as a divergence far above rounding (KLD 1e-8).
Axes: four architectures x rotary scalings x biases x both spellings of the config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.conversion.pipeline import export
from smolexport.errors import UnsupportedError
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama llama3 factors": ("llama", {"rope_scaling": LLAMA3}),
    "llama linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama yarn": ("llama", {"rope_scaling": YARN}),
    "llama yarn, own betas": (
        "llama",
        {"rope_scaling": YARN | {"beta_fast": 64, "beta_slow": 2, "attention_factor": 1.5}},
    ),
    "llama yarn, not truncated": ("llama", {"rope_scaling": YARN | {"truncate": False}}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama untied, wide heads": ("llama", {"tie_word_embeddings": False, "head_dim": 32}),
    "mistral": ("mistral", {}),
    "mistral without a window": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "smollm3": ("smollm3", {}),
    "smollm3 yarn": ("smollm3", {"rope_scaling": YARN}),
    "smollm3 yarn, own magnitude": ("smollm3", {"rope_scaling": YARN | {"attention_factor": 1.3}}),
    "smollm3 yarn, mscale": ("smollm3", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3 linear": ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "qwen3 yarn": ("qwen3", {"rope_scaling": YARN}),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean KLD over positions, nats; [n, v] logits each."""

    def log_probabilities(x: NDArray[np.float32]) -> NDArray[np.float64]:
        y = x.astype(np.float64) - x.max(-1, keepdims=True)
        return np.asarray(y - np.log(np.exp(y).sum(-1, keepdims=True)))

    p, q = log_probabilities(reference), log_probabilities(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def play_both(folder: Path, file: Path, count: int = 96) -> float:
    """KLD of llama.cpp on `file` from torch f32 on `folder`, over `count` random tokens."""
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    import smolexport_on_llamacpp as llamacpp
    import smolexport_on_torch as torch

    with torch.open(folder, dtype="f32", threads=1, context=128) as session:
        tokens = np.random.default_rng(3).integers(0, session.vocab_size, count)
        reference = session.append(tokens)
    with llamacpp.open(file, threads=1, context=128, kv_type="f32", flash_attention=False) as session:
        return divergence(reference, session.append(tokens))


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_torch_computes(case: str, tokenizer: Path, tmp_path: Path) -> None:
    model_type, overrides = CASES[case]
    folder = write_checkpoint(tmp_path / "model", model_type, dtype="f32", seed=11, tokenizer=tokenizer, **overrides)
    done = export("gguf", folder, tmp_path / "model.gguf", quant="f32")
    kld = play_both(folder, done.path)
    assert kld < 1e-8


@pytest.mark.parametrize("case", CASES)
def test_both_spellings_of_the_config_give_the_same_file(case: str, tokenizer: Path, tmp_path: Path) -> None:
    model_type, overrides = CASES[case]
    files = []
    for old_style in (True, False):
        folder = tmp_path / str(old_style) / "model"
        write_checkpoint(folder, model_type, seed=1, tokenizer=tokenizer, old_style=old_style, **overrides)
        files.append(export("gguf", folder, tmp_path / f"{old_style}.gguf", quant="q8_0").path.read_bytes())
    assert files[0] == files[1]


def test_the_check_would_notice_a_moved_nope_layer(tokenizer: Path, tmp_path: Path) -> None:
    """The test above can fail: a file whose NoPE layers are not the checkpoint's diverges visibly."""
    folder = write_checkpoint(tmp_path / "a", "smollm3", dtype="f32", seed=2, tokenizer=tokenizer)
    moved = [1, 1, 0, 1, 1, 1, 1, 0]
    other = write_checkpoint(tmp_path / "b", "smollm3", dtype="f32", seed=2, tokenizer=tokenizer, no_rope_layers=moved)
    done = export("gguf", folder, tmp_path / "a.gguf", quant="f32")
    assert play_both(other, done.path) > 1e-4


@pytest.mark.parametrize(
    ("model_type", "overrides", "said"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1, 1, 1, 0]}, "hard-coded"),
        ("smollm3", {"attention_bias": True}, "o_bias false"),
        ("smollm3", {"mlp_bias": True}, "mlp bias false"),
        ("smollm3", {"rope_scaling": LLAMA3}, "llama3"),
        ("smollm3", {"rope_scaling": YARN | {"beta_fast": 64}}, "beta_fast 32"),
        ("qwen2", {"rope_scaling": LLAMA3}, "llama3"),
        ("qwen3", {"rope_scaling": YARN | {"truncate": False}}, "truncate false"),
        ("qwen3", {"attention_bias": True}, "o_bias false"),
        ("mistral", {"sliding_window": 24}, "window none, the checkpoint has 24"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(
    model_type: str, overrides: dict[str, Any], said: str, tokenizer: Path, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model", model_type, tokenizer=tokenizer, **overrides)
    with pytest.raises(UnsupportedError, match=said):
        export("gguf", folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()

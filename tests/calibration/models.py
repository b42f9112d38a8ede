"""Tiny checkpoints whose every feature shows in their logits, and texts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.model.arch import architectures
from smolexport.model.checkpoint import Checkpoint, open_checkpoint
from tests.cli.commands import tiny_checkpoint

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama untied, all biases": ("llama", {
        "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "dtype": "f32"}),
    "llama, llama3 rope": ("llama", {"rope_scaling": LLAMA3, "dtype": "f16"}),
    "llama, linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral, a window": ("mistral", {"sliding_window": 24}),
    "smollm3, a layer without rope": ("smollm3", {"num_hidden_layers": 4}),
    "smollm3, yarn": ("smollm3", {"num_hidden_layers": 4, "rope_scaling": YARN, "tie_word_embeddings": False}),
    "qwen2, biases": ("qwen2", {"num_hidden_layers": 3}),
    "qwen3, normed heads": ("qwen3", {"num_key_value_heads": 1}),
}  # fmt: skip
FAMILIES = architectures()


def made(folder: Path, case: str) -> Checkpoint:
    model_type, options = CASES[case]
    return open_checkpoint(tiny_checkpoint(folder, model_type, **options))


def random_ids(n: int, vocab_size: int = 320, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(3, vocab_size, n).astype(np.int32)


def ids_file(folder: Path, n: int = 2048, seed: int = 0) -> Path:
    path = folder / f"ids-{seed}.npy"
    np.save(path, random_ids(n, seed=seed))
    return path

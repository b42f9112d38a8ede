"""A file read back is the checkpoint again: exactly for f32, within a quantization step otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import smolexport_to_gguf as gguf
from smolexport.checkpoint import open_checkpoint
from smolexport.convert import export
from smolexport.errors import FileFormatError
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer

FAMILIES = ["llama", "smollm3", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("family", FAMILIES)
def test_f32_gives_back_every_tensor_exactly(family: str, tokenizer: Path, tmp_path: Path) -> None:
    biased = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False} if family == "llama" else {}
    folder = write_checkpoint(tmp_path / "model", family, tokenizer=tokenizer, shards=3, **biased)
    done = export("gguf", folder, tmp_path / "model.gguf", quant="f32")
    checkpoint = open_checkpoint(folder)
    back = dict(gguf.read_back(done.path, checkpoint.spec))
    assert list(back) == list(checkpoint.spec.tensors())
    for tensor, values in back.items():
        original = checkpoint.stored[tensor].read_rows().astype(np.float32)
        np.testing.assert_array_equal(values, original.reshape(tensor.shape))


@pytest.mark.parametrize(("scheme", "error"), [("q8_0", 0.006), ("q6_k", 0.02), ("q4_k", 0.08), ("q2_k", 0.3)])
def test_quantized_files_give_back_near_values(scheme: str, error: float, tokenizer: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "model", "llama", tokenizer=tokenizer, hidden_size=256, intermediate_size=512, num_hidden_layers=2
    )
    done = export("gguf", folder, tmp_path / "model.gguf", quant=scheme)
    checkpoint = open_checkpoint(folder)
    for tensor, values in gguf.read_back(done.path, checkpoint.spec):
        original = checkpoint.stored[tensor].read_rows().astype(np.float32).reshape(tensor.shape)
        distance = np.linalg.norm(values - original) / np.linalg.norm(original)
        assert distance <= error, tensor


def test_a_file_of_another_model_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer)
    other = write_checkpoint(tmp_path / "other", "llama", tokenizer=tokenizer, intermediate_size=96)
    done = export("gguf", folder, tmp_path / "model.gguf", quant="q8_0")
    with pytest.raises(FileFormatError, match="ffn_gate"):
        list(gguf.read_back(done.path, open_checkpoint(other).spec))

"""Reading back what the conformance suite does not cover: biases, shards, an untied head, another model's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import smolexport
from smolexport.conversion.pipeline import export
from smolexport.errors import FileFormatError
from smolexport.model.checkpoint import open_checkpoint
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_biases_shards_and_an_untied_head_come_back_exactly(tokenizer: Path, tmp_path: Path) -> None:
    biased = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    folder = write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer, shards=3, **biased)
    done = export("gguf", folder, tmp_path / "model.gguf", quant="f32")
    checkpoint = open_checkpoint(folder)
    back = dict(smolexport.read_back(done.path, checkpoint.spec))
    assert list(back) == list(checkpoint.spec.tensors())
    for tensor, values in back.items():
        original = checkpoint.stored[tensor].read_rows().astype(np.float32)
        np.testing.assert_array_equal(values, original.reshape(tensor.shape))


def test_a_file_of_another_model_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer)
    other = write_checkpoint(tmp_path / "other", "llama", tokenizer=tokenizer, intermediate_size=96)
    done = export("gguf", folder, tmp_path / "model.gguf", quant="q8_0")
    with pytest.raises(FileFormatError, match="gate_proj"):
        list(smolexport.read_back(done.path, open_checkpoint(other).spec))

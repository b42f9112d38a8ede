"""The tiny checkpoints and tokenizers that tests and adapter authors use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from smolexport.errors import UsageError
from smolexport.model.arch import architectures, load_spec
from smolexport.testing import checkpoints
from smolexport.testing.checkpoints import tiny_config, write_checkpoint, write_tokenizer

FAMILIES = architectures()


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def test_every_architecture_has_one() -> None:
    assert sorted(checkpoints.FAMILIES) == architectures()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_tensors_are_those_of_the_spec(tmp_path: Path, family: str, dtype: str) -> None:
    write_checkpoint(tmp_path, family, dtype=dtype, tie_word_embeddings=False)
    spec = load_spec(json.loads((tmp_path / "config.json").read_text()))
    assert stored(tmp_path) == {t.stored_name: (dtype.upper(), t.shape) for t in spec.tensors()}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_are_one_model(family: str) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    old = tiny_config(family, rope_theta=12345.0, rope_scaling=scaling)
    new = tiny_config(family, rope_theta=12345.0, rope_scaling=scaling, old_style=False)
    assert "rope_theta" not in new
    assert "rope_parameters" not in old
    assert load_spec(old) == load_spec(new)
    assert load_spec(tiny_config(family)) == load_spec(tiny_config(family, old_style=False)) != load_spec(old)


def test_shards_hold_the_same_bytes(tmp_path: Path) -> None:
    one, three = (write_checkpoint(tmp_path / str(n), "qwen3", shards=n, seed=5) for n in (1, 3))
    assert len(list(three.glob("model-*.safetensors"))) == 3
    index = json.loads((three / "model.safetensors.index.json").read_text())["weight_map"]
    assert stored(one) == stored(three)
    with safe_open(one / "model.safetensors", framework="numpy") as whole:
        for name, file in index.items():
            with safe_open(three / file, framework="numpy") as part:
                np.testing.assert_array_equal(whole.get_tensor(name), part.get_tensor(name))


def test_the_seed_decides(tmp_path: Path) -> None:
    files = [
        (write_checkpoint(tmp_path / str(i), "llama", seed=s) / "model.safetensors").read_bytes()
        for i, s in enumerate([1, 1, 2])
    ]
    assert files[0] == files[1] != files[2]


def test_smollm3_leaves_out_the_rotation_on_every_fourth_layer() -> None:
    rotary = [layer.mixer.rope is not None for layer in load_spec(tiny_config("smollm3")).layers]
    assert rotary == [True, True, True, False] * 2


def test_overrides_reach_the_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", hidden_size=96, num_attention_heads=6, num_hidden_layers=2)
    spec = load_spec(json.loads((tmp_path / "config.json").read_text()))
    assert (spec.hidden_size, spec.attention.num_attention_heads, len(spec.layers), spec.attention.head_dim) == (
        96,
        6,
        2,
        16,
    )


@pytest.mark.parametrize("size", [259, 320, 500])
def test_tokenizer(tmp_path: Path, size: int) -> None:
    from tokenizers import Tokenizer

    write_tokenizer(tmp_path, vocab_size=size)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == size
    text = "The cat and the hat, 1234 naïve 中文 🙂\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_start|>a<|im_end|>").ids[::2] == [1, 2]
    digits = [tokenizer.encode(d).ids for d in "123"]
    assert tokenizer.encode("123").ids == [i for d in digits for i in d]
    if size > 259:
        assert len(tokenizer.encode(" and the").ids) == 2
    again = write_tokenizer(tmp_path / "again", vocab_size=size)
    assert (again / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_the_product_reads_the_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from smolexport.tokenizer import open_tokenizer, read_tokenizer

    write_tokenizer(tmp_path / "tokenizer")
    folder = write_checkpoint(tmp_path / "model", "llama", tokenizer=tmp_path / "tokenizer")
    codec = open_tokenizer(folder, read_tokenizer(folder, 320))
    text = "<|im_start|>user\nWhat is 42?<|im_end|>\n"
    assert codec.encode(text) == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert 2 in codec.stop_tokens


def test_the_vocabulary_follows_the_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", vocab_size=300)
    folder = write_checkpoint(tmp_path / "model", "llama", tokenizer=tmp_path / "tokenizer")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 300
    assert (folder / "tokenizer_config.json").exists()
    padded = write_checkpoint(tmp_path / "padded", "llama", tokenizer=tmp_path / "tokenizer", vocab_size=384)
    assert json.loads((padded / "config.json").read_text())["vocab_size"] == 384


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gpt9"):
        write_checkpoint(tmp_path, "gpt9")
    with pytest.raises(UsageError, match="int8"):
        write_checkpoint(tmp_path, "llama", dtype="int8")
    with pytest.raises(UsageError, match="258"):
        write_tokenizer(tmp_path, vocab_size=258)
    with pytest.raises(UsageError, match="100000 cannot be built"):
        write_tokenizer(tmp_path, vocab_size=100_000)

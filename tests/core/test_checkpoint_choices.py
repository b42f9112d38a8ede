"""Folders that leave a choice: two models, heads, claims of quantization.  What is taken is transformers', and said.

Every accepted folder is also exported, and the file's logits on its runtime are held against transformers'.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from smolexport.errors import CheckpointError, TensorError
from smolexport.model.arch import load_spec
from smolexport.model.checkpoint import open_checkpoint
from smolexport.model.spec import Role
from smolexport.plugins import runtime_for
from smolexport.testing.checkpoints import write_safetensors
from tests.cases_for_tests import made_case
from tests.cli.commands import assert_refused, call
from tests.damage import join, split

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBED, UP = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
IDS = [1, 42, 425, 81, 1194, 14]


@pytest.fixture
def folder(demo: Path, tmp_path: Path) -> Path:
    """A copy of the demo checkpoint."""
    return Path(shutil.copytree(demo, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("held_out*")))


def weights(folder: Path) -> dict[str, NDArray[Any]]:
    return dict(load_file(folder / SINGLE))


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def reference(folder: Path, **options: Any) -> NDArray[np.float32]:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([IDS])).logits[0])


def exported_logits(target: str, folder: Path, out: Path, *flags: str) -> tuple[NDArray[np.float32], str]:
    """Of the f32 export on its own runtime, and what the command said."""
    done = call(target, folder, "-q", "f32", "-o", out, *flags)
    assert done.code == 0, done.err
    with runtime_for(out).open(out, threads=1) as session:
        return session.append(IDS), done.err


def played_everywhere(folder: Path, expected: NDArray[np.float32], *words: str) -> None:
    """Every runtime computes `expected`, the torch session included, and every export says `words`."""
    pytest.importorskip("llama_cpp"), pytest.importorskip("onnxruntime"), pytest.importorskip("mlx")
    for target, suffix, close in (("gguf", ".gguf", 2e-2), ("onnx", "-onnx", 1e-3), ("mlx", "-mlx", 1e-3)):
        found, said = exported_logits(target, folder, folder.parent / f"out{suffix}")
        np.testing.assert_allclose(found, expected, atol=close, err_msg=target)
        for word in words:
            assert word in said, said
    with runtime_for(folder).open(folder, threads=1, dtype="f32") as session:
        np.testing.assert_allclose(session.append(IDS), expected, atol=1e-3)


def test_a_single_file_beside_old_shards(demo: Path, tmp_path: Path) -> None:
    folder = made_case("08", tmp_path / "case")
    found = open_checkpoint(folder)
    place = next(p for t, p in found.stored.items() if t.stored_name == UP)
    np.testing.assert_array_equal(place.read_rows(), weights(demo)[UP])
    expected = reference(folder)
    np.testing.assert_array_equal(expected, reference(demo))
    played_everywhere(
        folder,
        expected,
        "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors are in the same folder but not read",
    )


def test_an_index_that_names_the_single_file_is_followed(folder: Path) -> None:
    arrays = weights(folder)
    write_safetensors(folder / "model-2.safetensors", {UP: arrays.pop(UP)})
    write_safetensors(folder / SINGLE, arrays)
    weight_map = dict.fromkeys(arrays, SINGLE) | {UP: "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    found = open_checkpoint(folder)
    assert found.notes == ()
    assert {p.path.name for p in found.stored.values()} == {SINGLE, "model-2.safetensors"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "consolidated.safetensors",
            "consolidated.safetensors is in the same folder but not read: model.safetensors is",
        ),
        ("model.fp16.safetensors", "model.fp16.safetensors is in the same folder but not read"),
        ("pytorch_model.bin", "pytorch_model.bin is in the same folder but not read"),
        ("consolidated.00.pth", "consolidated.00.pth is in the same folder but not read"),
        ("adapter_model.safetensors", "adapter_model.safetensors is in the same folder but not merged: the model is"),
    ],
)
def test_other_weights_in_the_folder_are_named(name: str, said: str, folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder / name)
    [note] = open_checkpoint(folder).notes
    assert note.startswith(said)


def test_stale_shards_beside_an_index_are_named(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(weights_of(folder), "model-00001-of-00001.safetensors")})
    )
    for number in range(1, 6):
        (folder / f"model-0000{number}-of-00005.safetensors").write_bytes(b"old")
    [note] = open_checkpoint(folder).notes
    assert "model-00003-of-00005.safetensors and 2 more files are in the same folder but not read" in note


def weights_of(folder: Path) -> list[str]:
    return list(load_file(next(folder.glob("*.safetensors"))))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: (f / SINGLE).rename(f / "model.fp16.safetensors"), "if model.fp16.safetensors is the model, rename"),
        (
            lambda f: shutil.copy((f / SINGLE).rename(f / "m-1.safetensors"), f / "m-2.safetensors"),
            "only m-1.safetensors, m-2.safetensors are there: the download is incomplete",
        ),
    ],
)
def test_weights_of_other_names(make: Any, said: str, folder: Path) -> None:
    make(folder)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter, not a model: merge it"),
        (lambda f: [(f / n).mkdir() or (f / n / "config.json").write_text("{}") for n in ("c-1", "c-2")], "e.g. c-2"),
        (lambda f: None, "not found; the folder is not a checkpoint"),
    ],
)
def test_what_a_folder_without_config_is(make: Any, said: str, folder: Path) -> None:
    (folder / "config.json").unlink()
    make(folder)
    assert_refused(call("gguf", folder, "-o", folder.parent / "x.gguf"), folder / "config.json", said)


def test_a_trained_head_of_a_tied_model_is_kept(tmp_path: Path, demo: Path) -> None:
    folder = made_case("60", tmp_path / "case")
    expected = reference(folder)
    assert np.abs(expected - reference(demo)).max() > 1
    played_everywhere(folder, expected, "lm_head.weight differs from model.embed_tokens.weight: both are kept")
    assert not open_checkpoint(folder).spec.tied


def test_a_head_without_an_embedding_is_both(folder: Path) -> None:
    arrays = weights(folder)
    arrays[HEAD] = arrays.pop(EMBED)
    write_safetensors(folder / SINGLE, arrays)
    played_everywhere(folder, reference(folder), "lm_head.weight serves as both")


def test_neither_a_head_nor_a_flag(demo: Path, tmp_path: Path) -> None:
    folder = made_case("77", tmp_path / "case")
    played_everywhere(folder, reference(demo), "does not say tie_word_embeddings: the embedding is the head")


def test_a_head_that_is_missing_against_the_flag(folder: Path) -> None:
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(TensorError, match=r"lm_head.weight is missing, .* false; .* set it to true if the embedding"):
        open_checkpoint(folder)


def test_a_head_that_equals_the_embedding_is_dropped_or_kept_by_the_flag(folder: Path) -> None:
    arrays = weights(folder)
    write_safetensors(folder / SINGLE, arrays | {HEAD: arrays[EMBED]})
    for flag, heads in ((True, 0), (False, 1)):
        edit(folder, tie_word_embeddings=flag)
        found = open_checkpoint(folder)
        assert sum(t.role is Role.HEAD for t in found.stored) == heads
        assert found.notes == ()


def test_a_file_of_a_tied_model_without_its_flag_is_still_right_when_quantized(tmp_path: Path) -> None:
    """`compare` decodes the file into torch: the untied head must reach it there too."""
    pytest.importorskip("torch"), pytest.importorskip("llama_cpp")
    folder = made_case("60", tmp_path / "case")
    assert call("gguf", folder, "-q", "int8", "-o", tmp_path / "x.gguf").code == 0
    flags = "--max-windows 2 --window 64 --greedy-tokens 0 --repetitions 0 --no-chat --json".split()
    done = call("compare", folder, tmp_path / "x.gguf", *flags)
    assert done.code == 0, done.err
    [result] = json.loads(done.out)["candidates"]
    assert result["kld"]["mean"] < 0.01


CLAIMS: dict[str, dict[str, Any]] = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "mlx": {"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 4, "group_size": 64}},
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_of_quantization_on_plain_weights_is_inert(claim: str, folder: Path, demo: Path) -> None:
    edit(folder, **CLAIMS[claim])
    played_everywhere(folder, reference(demo), "config.json claims quantized weights (quantization_config")
    for target in ("mlx", "onnx"):
        assert not [k for k in json.loads((folder.parent / f"out-{target}/config.json").read_text()) if "quant" in k]


@pytest.mark.parametrize(("dtype", "times"), [("I32", 2), ("U8", 0.5), ("F8_E4M3", 0.5)])
def test_quantized_weights_are_refused_by_method(dtype: str, times: float, folder: Path) -> None:
    edit(folder, **CLAIMS["gptq"])
    header, data = split(folder / SINGLE)
    rows, columns = header[UP]["shape"]
    header[UP] |= {"dtype": dtype, "shape": [rows, int(columns / times)]}
    join(folder / SINGLE, header, data)
    for flags in ((), ("--ignore-config", "quantization_config")):
        said = () if flags else ("quantized already (quantization_config: 'gptq')",)
        assert_refused(call("gguf", folder, "-o", folder.parent / "x.gguf", *flags), UP, "has dtype", *said)


def test_keys_that_transformers_itself_wrote(demo: Path, tmp_path: Path) -> None:
    folder = made_case("16", tmp_path / "case")
    played_everywhere(folder, reference(demo))


def test_every_key_that_any_transformers_writes_is_known(demo: Path) -> None:
    """The attributes of its base class, and how to sample, which earlier releases wrote into config.json."""
    transformers = pytest.importorskip("transformers")
    config = json.loads((demo / "config.json").read_text())
    written = transformers.PretrainedConfig().to_dict() | dict.fromkeys(EARLIER, 1) | config
    assert load_spec(written) == load_spec(config)


# What PretrainedConfig.to_dict() of transformers 4.30 holds of sampling.
EARLIER = frozenset(
    """max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens""".split()
)


@pytest.mark.parametrize("key", ["quantization_config", "auto_map", "rope_scaling", "sliding_window", "hidden_act"])
def test_every_key_can_be_ignored(key: str, folder: Path, demo: Path) -> None:
    values: dict[str, Any] = {
        "quantization_config": {"quant_method": "gptq"},
        "auto_map": {"AutoModel": "evil.py--Evil"},
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        "sliding_window": "wide",
        "hidden_act": "gelu",
    }
    edit(folder, **{key: values[key]})
    found = open_checkpoint(folder, ignore_config=[key])
    assert found.spec == open_checkpoint(demo).spec
    assert key not in found.config
    assert call("mlx", folder, "-q", "bf16", "-o", folder.parent / "m", "--ignore-config", key).code == 0
    written = json.loads((folder.parent / "m" / "config.json").read_text())
    assert written.get(key) != values[key]

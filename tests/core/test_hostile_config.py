"""config.json, tokenizer.json and the CHECKPOINT argument itself, wrong in every way: one line, nothing written."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolexport.errors import CheckpointError, SmolexportError
from smolexport.model.arch import architectures, load_spec
from smolexport.testing.checkpoints import tiny_config
from tests.cli.commands import assert_refused, call, tiny_checkpoint


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def refuse(folder: Path, *words: str | Path) -> None:
    target = folder.parent / "out"
    target.mkdir(exist_ok=True)
    assert_refused(call("gguf", folder, "-q", "f16", "-o", target / "x.gguf"), *words)
    assert list(target.iterdir()) == []


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not valid JSON"),
    "cut": (b'{"model_type": "lla', "is not valid JSON"),
    "no UTF-8": (b'{"model_type": "\xff"}', "is not valid JSON"),
    "a list": (b"[]", "expected a JSON object, found list"),
    "a number": (b"3", "expected a JSON object, found int"),
    "too deep": (b'{"a":' * 100_000, "is not valid JSON"),
    "a number of 5000 digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not valid JSON"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_config_that_is_no_json_object(fault: str, folder: Path) -> None:
    content, said = DAMAGED[fault]
    (folder / "config.json").write_bytes(content)
    refuse(folder, folder / "config.json", said)


def test_config_missing_or_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    refuse(folder, folder / "config.json", "not found; the folder is not a checkpoint")
    (folder / "config.json").mkdir()
    refuse(folder, folder / "config.json", "is not a regular file")


def test_config_too_large(folder: Path) -> None:
    with (folder / "config.json").open("ab") as file:
        file.truncate(10**12)  # sparse: takes no room, and must not be read into memory
    refuse(folder, folder / "config.json", "is larger than 64 MiB")


@pytest.mark.parametrize("depth", [50, 400, 900, 985, 995])
def test_value_nested_deeply(depth: int, folder: Path) -> None:
    """Depths that the JSON parser still takes but printing the value may not."""
    edit(folder, key_of_tomorrow=0)
    text = (folder / "config.json").read_text()
    nested = '{"a":' * depth + "1" + "}" * depth
    (folder / "config.json").write_text(text.replace('"key_of_tomorrow": 0', f'"key_of_tomorrow": {nested}'))
    refuse(folder, folder)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"model_type": "lama"}, "model_type 'lama' is not supported; known: llama"),
    "did you mean": ({"model_type": "smollm"}, "did you mean 'smollm3'?"),
    "path as architecture": ({"model_type": "../../evil"}, "is not supported"),
    "private module": ({"model_type": "_config"}, "is not supported"),
    "no architecture": ({"model_type": None}, "model_type None is not supported"),
    "list as architecture": ({"model_type": ["llama"]}, "is not supported"),
    "remote code": ({"auto_map": {"AutoModel": "evil.py--Evil"}}, "auto_map asks for code"),
    "key of tomorrow": ({"attention_sinks": 4}, "not understood and could change what the model computes"),
    "keys of tomorrow": (
        {"attention_sinks": 4, "a b": 0},
        "'a b' = 0, 'attention_sinks' = 4; if all are inert, pass --ignore-config 'a b' --ignore-config attention",
    ),
    "text for a size": ({"hidden_size": "64"}, "hidden_size = '64' must be of type int"),
    "bool for a size": ({"hidden_size": True}, "hidden_size = True must be of type int"),
    "real for a size": ({"hidden_size": 64.5}, "hidden_size = 64.5 must be of type int"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads = 0 must be positive"),
    "negative": ({"vocab_size": -5}, "vocab_size = -5 must be positive"),
    "NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan must be positive and finite"),
    "infinity": ({"rope_theta": float("inf")}, "rope_theta = inf must be positive and finite"),
    "huge epsilon": ({"rms_norm_eps": 10**400}, "rms_norm_eps is a number of 1329 bits"),
    "huge vocabulary": ({"vocab_size": 10**12}, "vocab_size is a number of 40 bits"),
    "huge count of layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is more than"),
    "many layers": ({"num_hidden_layers": 1024}, "model.layers.2.input_layernorm.weight [64] is missing"),
    "large vocabulary": ({"vocab_size": 2**31 - 1}, "config.json asks for [2147483647, 64]"),
    "large heads": ({"head_dim": 2**30}, "config.json asks for [4294967296, 64]"),
    "large feed-forward": ({"intermediate_size": 2**30}, "config.json asks for [1073741824, 64]"),
    "long context": ({"max_position_embeddings": 10**30}, "max_position_embeddings is a number of 100 bits"),
    "odd heads": ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3"),
    "other activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    "unknown rope": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    "rope no object": ({"rope_scaling": 2.0}, "rope_scaling = 2.0 must be an object"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_config_that_makes_no_sense(fault: str, folder: Path) -> None:
    changes, said = CONFIGS[fault]
    edit(folder, **changes)
    started = time.perf_counter()
    refuse(folder, folder, said)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("model_type", ["smollm3", "qwen2", "qwen3"])
def test_a_billion_layers_cost_nothing(model_type: str) -> None:
    with pytest.raises(SmolexportError, match="num_hidden_layers 1000000000"):
        load_spec({**tiny_config(model_type), "num_hidden_layers": 10**9})


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.integers(-4, 4) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted({key for model_type in architectures() for key in tiny_config(model_type)})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(architectures()), st.sampled_from(KEYS), JUNK)
def test_any_value_of_any_key_is_read_or_refused(model_type: str, key: str, value: object) -> None:
    try:
        spec = load_spec({**tiny_config(model_type), key: value})
    except SmolexportError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert spec.attention.num_attention_heads % spec.attention.num_key_value_heads == 0
    assert "\n" not in refusal.replace(repr(value), "")


BYTE_LEVEL = b'{"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}'
TOKENIZERS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "tokenizer.json"),
    "empty": (b"", "is not valid JSON"),
    "a list": (b"[]", "not an object"),
    "no structure": (b"{}", "unknown pre_tokenizer: nothing"),
    "no model": (BYTE_LEVEL + b"}", "model is None, not an object"),
    "model of text": (BYTE_LEVEL + b', "model": "BPE"}', "model is 'BPE', not an object"),
    "vocabulary of numbers": (BYTE_LEVEL + b', "model": {"type": "BPE", "vocab": 7}}', "vocab is 7, not an object"),
    "too deep": (b'{"model":' * 100_000, "nested too deeply"),
    "no UTF-8": (b'{"model": "\xff"}', "is not UTF-8"),
}


@pytest.mark.parametrize("fault", TOKENIZERS)
def test_malformed_tokenizer(fault: str, folder: Path) -> None:
    content, said = TOKENIZERS[fault]
    path = folder / "tokenizer.json"
    path.unlink() if content is None else path.write_bytes(content)
    refuse(folder, path if content is not None else folder, said)


def test_vocabulary_that_is_larger_than_the_model(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zz"] = 10**7
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refuse(folder, folder / "tokenizer.json", "token 'zz'", "320 rows")


def test_checkpoint_argument(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    for argument, said in {
        str(tmp_path / "weights.safetensors"): "is a file; give the checkpoint's folder",
        str(tmp_path / "nothing" / "here"): "no such folder; give a folder, a hub id 'owner/name', or 'demo'",
        "nothing-here": "no such folder; give a folder",
        "a/b/c": "no such folder",
        "../nothing": "no such folder",
        "owner/": "no such folder",
        "owner/na me": "neither a folder nor a valid hub id",
        "x" * 300: "File name too long",
    }.items():
        assert_refused(call("gguf", argument, "--dry-run"), argument, said)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_id_that_is_not_in_the_cache(hub: Path) -> None:
    outcome = call("gguf", "owner/name", "--dry-run")
    assert_refused(outcome, "owner/name", "no such folder, the hub cannot be reached and the cache has no copy")
    assert not hub.exists() or not list(hub.rglob("*.safetensors"))


def cache(hub: Path, folder: Path, commit: str, *refs: str) -> Path:
    """Put `folder` into the cache as one snapshot of owner/name, as huggingface_hub lays it out."""
    home = hub / "models--owner--name"
    snapshot = home / "snapshots" / commit
    (home / "refs").mkdir(parents=True, exist_ok=True)
    for ref in refs:
        (home / "refs" / ref).write_text(commit)
    shutil.copytree(folder, snapshot)
    return snapshot


def test_hub_id_from_the_cache(hub: Path, folder: Path) -> None:
    from smolexport.model.checkpoint import find_checkpoint

    first = cache(hub, folder, "1" * 40, "main")
    second = cache(hub, folder, "2" * 40, "v2")
    assert find_checkpoint("owner/name", cache_dir=hub) == first
    assert find_checkpoint("owner/name", revision="v2", cache_dir=hub) == second
    assert find_checkpoint("owner/name", revision="2" * 40, cache_dir=hub) == second
    with pytest.raises(CheckpointError, match=r"owner/name.*the cache has no copy"):
        find_checkpoint("owner/name", revision="v3", cache_dir=hub)


def test_exporting_from_the_cache(hub: Path, folder: Path, tmp_path: Path) -> None:
    cache(hub, folder, "1" * 40, "main")
    edit(cache(hub, folder, "2" * 40, "v2"), max_position_embeddings=128)
    assert call("gguf", "owner/name", "-q", "f16", "-o", tmp_path, "--name", "main").code == 0
    outcome = call("gguf", "owner/name", "-q", "f16", "-o", tmp_path, "--revision", "v2", "--json")
    facts = json.loads(outcome.out)
    assert facts["path"] == str(tmp_path / "name-f16.gguf")
    metadata = json.loads(call("inspect", "--json", facts["path"]).out)["metadata"]
    assert (metadata["general.name"], metadata["llama.context_length"]) == ("name", 128)

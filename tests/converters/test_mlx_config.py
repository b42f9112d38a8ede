"""What the MLX folder's config.json says, held against mlx-lm and transformers themselves; what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolexport.conversion.folder_files import eos_ids
from smolexport.conversion.source_model import SourceModel
from smolexport.model.arch import load_spec
from smolexport.model.rope import Linear, Llama3, Rope, Yarn
from smolexport.model.spec import Layer, ModelSpec
from smolexport_to_mlx.architectures import ROWS, check, notes
from smolexport_to_mlx.folder import compose, quantization_object
from tests.converters.mlx_models import FAMILIES, model_of, tiny_model
from tests.core.published_configs import PUBLISHED
from tests.mlx_for_tests import mlx_lm, needs_mlx

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear, old word": {"type": "linear", "factor": 2.5},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64},
    "llama3, other ramp": {**LLAMA3, "low_freq_factor": 2, "high_freq_factor": 16, "factor": 32},
    "yarn": YARN,
    "yarn, attention factor": {**YARN, "attention_factor": 0.8},
    "yarn, attention factor 1": {**YARN, "attention_factor": 1.0},
    "yarn, mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.3},
    "yarn, mscale alone": {**YARN, "mscale": 2.0},
    "yarn, betas": {**YARN, "beta_fast": 24.0, "beta_slow": 2.0, "factor": 16.0},
    "yarn, no factor": {"rope_type": "yarn", "original_max_position_embeddings": 64, "factor": None},
    "yarn, factor 1": {**YARN, "factor": 1.0},
}
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def mlx_model(config: dict[str, Any]) -> Any:
    """mlx-lm's own model for a config; its weights are never computed."""
    made, arguments = mlx_lm("utils")._get_classes(json.loads(json.dumps(config)))
    return made(arguments.from_dict(config))


def turned_by_mlx(rope: Any, dim: int) -> tuple[np.ndarray, float]:
    """(angles per position [dim / 2], magnitude) of an mlx rope object, seen from what it does to (1, 0) pairs."""
    import mlx.core as mx

    x = mx.concatenate([mx.ones((1, 1, 1, dim // 2)), mx.zeros((1, 1, 1, dim // 2))], axis=-1)
    cos, sin = np.array(rope(x, offset=1)).reshape(2, -1).astype(np.float64)
    return np.arctan2(sin, cos), float(np.hypot(cos, sin).mean())


def rotary_of_transformers(config: dict[str, Any], folder: Path) -> tuple[np.ndarray, float]:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))  # the families share it
    return rotary.inv_freq.double().numpy(), float(rotary.attention_scaling)


def rotary_model(folder: Path, model_type: str, scaling: str, old_style: bool) -> SourceModel:
    sizes = {"head_dim": 64, "hidden_size": 256}  # qwen2's are bound to each other
    chosen = SCALINGS[scaling]
    if chosen and not old_style and "type" in chosen:  # transformers 5 has one word for it
        chosen = {"rope_type": chosen["type"], **{k: v for k, v in chosen.items() if k != "type"}}
    return tiny_model(folder, model_type, old_style=old_style, rope_scaling=chosen, **sizes)


@needs_mlx
@needs_transformers
@pytest.mark.parametrize("old_style", [True, False], ids=["transformers4", "transformers5"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_reader_rotates_alike(tmp_path: Path, model_type: str, scaling: str, old_style: bool) -> None:
    model = rotary_model(tmp_path / "in", model_type, scaling, old_style)
    rope = model.spec.rope
    assert rope is not None
    assert check(model.spec) == []
    config = compose(model, {"group_size": 64, "bits": 4, "mode": "affine"}, "BF16")
    angles, magnitude = turned_by_mlx(mlx_model(config).layers[0].self_attn.rope, rope.dim)
    np.testing.assert_allclose(angles, rope.inverse_frequencies(), rtol=2e-5)
    assert magnitude == pytest.approx(rope.attention_factor, rel=1e-5)
    theirs, their_magnitude = rotary_of_transformers(config, tmp_path / "out")
    first, first_magnitude = rotary_of_transformers(dict(model.config), tmp_path / "again")
    np.testing.assert_array_equal(theirs, first)
    assert their_magnitude == pytest.approx(first_magnitude, rel=1e-12)
    np.testing.assert_allclose(theirs, rope.inverse_frequencies(), rtol=2e-6)
    assert their_magnitude == pytest.approx(rope.attention_factor, rel=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_both_spellings_make_the_same_config(tmp_path: Path, model_type: str, scaling: str) -> None:
    old = compose(rotary_model(tmp_path / "4", model_type, scaling, True), None, "F16")
    new = compose(rotary_model(tmp_path / "5", model_type, scaling, False), None, "F16")
    assert json.dumps(old) == json.dumps(new)
    assert old["rope_theta"] == old["rope_parameters"]["rope_theta"]
    if SCALINGS[scaling] is None:
        assert "rope_scaling" not in old
        assert old["rope_parameters"] == {"rope_theta": old["rope_theta"], "rope_type": "default"}
    else:
        assert old["rope_parameters"] == {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
        assert old["rope_scaling"]["rope_type"] == old["rope_scaling"]["type"]
        tokens = [v for k, v in old["rope_scaling"].items() if k == "original_max_position_embeddings"]
        assert all(type(v) is int for v in tokens)


@needs_mlx
def test_mlx_ignores_what_transformers_5_writes_and_reads_what_we_write(tmp_path: Path) -> None:
    """The trap itself: without our rewriting, mlx-lm computes with a base of 10,000 and without the scaling."""
    source = tiny_model(tmp_path, "llama", old_style=False, rope_theta=5e5, rope_scaling=SCALINGS["llama3"])
    assert type(mlx_model(dict(source.config)).layers[0].self_attn.rope).__name__ == "RoPE"
    assert type(mlx_model(compose(source, None, "BF16")).layers[0].self_attn.rope).__name__ == "Llama3RoPE"
    plain = tiny_model(tmp_path, "smollm3", old_style=False)
    assert mlx_model(dict(plain.config)).args.rope_theta == 10_000
    assert mlx_model(compose(plain, None, "BF16")).args.rope_theta == 5e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_written_config_describes_the_same_model(tmp_path: Path, name: str) -> None:
    model = model_of(PUBLISHED[name], tmp_path)
    assert check(model.spec) == []
    config = compose(model, {"group_size": 32, "bits": 4, "mode": "affine"}, "BF16")
    assert config["quantization"] == config.pop("quantization_config")
    del config["quantization"]
    assert load_spec(config) == model.spec
    assert list(config) == sorted(config)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    again = compose(replace(model, config=config), None, "BF16")
    assert again == config
    explicit = {"tie_word_embeddings": bool, "head_dim": int, "num_key_value_heads": int, "rms_norm_eps": float}
    assert {key: type(config[key]) for key in explicit} == explicit
    assert config["eos_token_id"] == PUBLISHED[name]["eos_token_id"]


@needs_mlx
@pytest.mark.parametrize("model_type", FAMILIES)
def test_check_refuses_exactly_what_the_class_cannot_hold(tmp_path: Path, model_type: str) -> None:
    """Over all biases, norms and head sizes: no reason is given when, and only when, mlx-lm has the same tensors."""
    from mlx.utils import tree_flatten

    model = tiny_model(tmp_path, model_type, num_hidden_layers=4)
    flags = ("qkv_bias", "o_bias", "qk_norm")
    accepted = 0
    for *values, mlp_bias, tied in product((False, True), repeat=len(flags) + 2):
        for head_dim in (16, 32):
            changed = dict(zip(flags, values, strict=True))
            heads = [(x, x.mixer.rope and replace(x.mixer.rope, dim=head_dim)) for x in model.spec.layers]
            layers = tuple(
                Layer(replace(x.mixer, **changed, head_dim=head_dim, rope=rope), replace(x.mlp, bias=mlp_bias))
                for x, rope in heads
            )
            spec = replace(model.spec, tied=tied, layers=layers)
            config = compose(replace(model, spec=spec), None, "BF16")
            theirs = {name: tuple(array.shape) for name, array in tree_flatten(mlx_model(config).parameters())}
            same = theirs == {t.stored_name: t.shape for t in spec.tensors()}
            assert (check(spec) == []) == same, (changed, mlp_bias, tied, head_dim, check(spec))
            accepted += same
    assert accepted == {"llama": 16, "mistral": 4, "smollm3": 16, "qwen2": 2, "qwen3": 4}[model_type]


@needs_mlx
def test_mlx_skips_the_rotation_on_the_same_layers(tmp_path: Path) -> None:
    odd = [1, 0, 0, 1, 1, 1, 0, 1]
    model = tiny_model(tmp_path, "smollm3", no_rope_layers=[*odd, 1, 1], layer_types=["full_attention"] * 8)
    config = compose(model, None, "BF16")
    assert config["no_rope_layers"] == odd  # mlx-lm refuses a list that is too long
    assert config["layer_types"] == ["full_attention"] * 8
    kinds = [type(layer.self_attn.rope).__name__ for layer in mlx_model(config).layers]
    assert kinds == ["RoPE" if rotary else "NoPE" for rotary in odd]
    bare = tiny_model(tmp_path, "smollm3", no_rope_layers=[0] * 8)
    assert check(bare.spec) == []
    assert {type(x.self_attn.rope).__name__ for x in mlx_model(compose(bare, None, "BF16")).layers} == {"NoPE"}


def each_layer(spec: ModelSpec, change: Callable[[Layer], Layer]) -> ModelSpec:
    return replace(spec, layers=tuple(change(layer) for layer in spec.layers))


def mixer(**changes: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: each_layer(spec, lambda x: replace(x, mixer=replace(x.mixer, **changes)))


def mlp(**changes: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: each_layer(spec, lambda x: replace(x, mlp=replace(x.mlp, **changes)))


def with_scaling(scaling: Any) -> Callable[[ModelSpec], ModelSpec]:
    def change(layer: Layer) -> Layer:
        rope = layer.mixer.rope
        return replace(layer, mixer=replace(layer.mixer, rope=rope and replace(rope, scaling=scaling)))

    return lambda spec: each_layer(spec, change)


def second_layer(**changes: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: replace(spec, layers=(spec.layers[0], mixer(**changes)(spec).layers[1], *spec.layers[2:]))


REFUSED: dict[str, tuple[str, Callable[[ModelSpec], ModelSpec], tuple[str, ...]]] = {
    "unknown": (
        "llama",
        lambda s: replace(s, model_type="mamba"),
        ("'mamba'", "llama, mistral, smollm3"),
    ),
    "window": ("llama", second_layer(window=128), ("window none", "128 on layer 1")),
    "nope": ("qwen3", second_layer(rope=None), ("every layer", "layers [1]")),
    "two bases": ("smollm3", second_layer(rope=Rope(123.0, 16)), ("one rotary", "123.0", "5000000.0")),
    "part of a head": (
        "llama",
        mixer(rope=Rope(1e4, 8)),
        ("all 16 dimensions", "checkpoint 8"),
    ),
    "yarn limits": ("qwen2", with_scaling(Yarn(4.0, 128, 1.1, truncate=False)), ("truncate true", "truncate false")),
    "yarn magnitude": ("qwen3", with_scaling(Yarn(1.0, 128, 1.25)), ("no magnitude but 1", "1.25")),
    "half the biases": ("llama", mixer(qkv_bias=True), ("qkv_bias true", "o_bias false")),
    "qwen2 without": ("qwen2", mixer(qkv_bias=False), ("qkv_bias true", "checkpoint has false")),
    "qwen2 o bias": ("qwen2", mixer(o_bias=True), ("o_bias false", "checkpoint has true")),
    "qwen2 head": ("qwen2", mixer(head_dim=32, rope=Rope(1e6, 32)), ("head_dim of 32", "64 / 4")),
    "qwen3 biases": ("qwen3", mixer(qkv_bias=True), ("qkv_bias false", "checkpoint has true")),
    "qwen3 mlp": ("qwen3", mlp(bias=True), ("mlp bias false", "checkpoint has true")),
    "no norms": ("qwen3", mixer(qk_norm=False), ("qk_norm true", "checkpoint has false")),
    "norms": ("smollm3", mixer(qk_norm=True), ("qk_norm false", "checkpoint has true")),
    "gelu": ("llama", mlp(activation="gelu"), ("silu", "gelu")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_both_values(tmp_path: Path, case: str) -> None:
    model_type, change, words = REFUSED[case]
    spec = tiny_model(tmp_path, model_type).spec
    assert check(spec) == []
    reasons = check(change(spec))
    assert any(all(word in reason for word in words) for reason in reasons), reasons
    assert all("\n" not in reason for reason in reasons)


@needs_mlx
@pytest.mark.parametrize("case", ["yarn limits", "yarn magnitude"])
def test_what_is_refused_would_have_been_wrong(tmp_path: Path, case: str) -> None:
    model_type, change, _ = REFUSED[case]
    sizes = {"head_dim": 64, "hidden_size": 256}
    model = tiny_model(tmp_path, model_type, **sizes)
    spec = change(model.spec)
    rope = spec.rope
    assert rope is not None
    config = compose(replace(model, spec=spec), None, "BF16")
    angles, magnitude = turned_by_mlx(mlx_model(config).layers[0].self_attn.rope, 64)
    far = np.abs(angles / rope.inverse_frequencies() - 1).max()
    assert far > 1e-3 or abs(magnitude - rope.attention_factor) > 1e-3  # the readers above agree to 2e-5


def test_every_architecture_has_a_row() -> None:
    from smolexport.model.arch import architectures

    assert set(ROWS) == set(architectures())


@pytest.mark.parametrize(
    ("model_type", "scaling", "words"),
    [
        ("llama", Llama3(8, 1, 4, 64), None),
        ("llama", Linear(2), None),
        ("llama", Yarn(4, 128, 1.1), "llama refuses to load"),
        ("smollm3", Yarn(4, 128, 1.1), "smollm3 ignores it"),
        ("smollm3", Linear(2), "smollm3 ignores it"),
        ("smollm3", None, None),
        ("qwen2", Yarn(4, 128, 1.1), "qwen2 ignores it"),
        ("qwen3", Linear(2), None),
    ],
)
def test_notes_say_what_a_phone_does(tmp_path: Path, model_type: str, scaling: Any, words: str | None) -> None:
    found = notes(with_scaling(scaling)(tiny_model(tmp_path, model_type).spec))
    assert found == [] if words is None else (len(found) == 1 and words in found[0])


def test_leftovers_are_dropped_and_the_rest_is_carried_over(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "llama", rope_traditional=None, initializer_range=0.02, sliding_window=None)
    odd = {
        "_name_or_path": "someone/model",
        "quantization": {"bits": 2},
        "quantization_config": None,
        "model_file": "evil.py",
        "auto_map": {},
        "rope_traditional": True,
        "quantize_activations": True,
        "vision_config": {},
        "original_max_position_embeddings": 7,
        "initializer_range": float("nan"),
        "id2label": {"0": [float("inf")]},
        "label2id": {"\ud800": 0},
        "deep": json.loads("[" * 900 + "]" * 900),
        "transformers_version": "4.42.3",
    }
    config = compose(replace(model, config={**model.config, **odd}), None, "F32")
    assert not set(config) & (set(odd) - {"deep", "transformers_version"})
    assert config["transformers_version"] == "4.42.3"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    json.dumps(config, allow_nan=False, ensure_ascii=False).encode()


def test_special_tokens_are_spelled_out(tmp_path: Path) -> None:
    source = tiny_model(tmp_path)
    assert compose(source, None, "F32")["eos_token_id"] == 2  # the config's own
    bare = replace(source, config={k: v for k, v in source.config.items() if not k.endswith("token_id")})
    config = compose(bare, None, "F32")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 2, 2)
    two = replace(bare, tokenizer=replace(bare.tokenizer, eos=0, stop_tokens=frozenset({0, 2})))
    assert eos_ids(two) == [0, 2]
    assert compose(two, None, "F32")["eos_token_id"] == [0, 2]
    kept = replace(two, config={**bare.config, "eos_token_id": [5, 2]})
    assert compose(kept, None, "F32")["eos_token_id"] == [5, 2]
    none = replace(bare, tokenizer=replace(bare.tokenizer, eos=None, stop_tokens=frozenset()))
    assert compose(none, None, "F32")["eos_token_id"] is None


def test_quantization_object_names_what_departs_and_nothing_else() -> None:
    default = {"group_size": 64, "bits": 4, "mode": "affine"}
    made = quantization_object(
        default,
        {
            "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
            "lm_head": {"group_size": 64, "bits": 4, "mode": "affine"},
            "model.layers.0.mlp.down_proj": False,
        },
    )
    assert made == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
        "model.layers.0.mlp.down_proj": False,
    }

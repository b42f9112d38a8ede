"""ModelSpec against transformers: names, shapes, rotary frequencies; and every key that is not understood."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from smolexport.errors import ConfigError
from smolexport.model.arch import architectures, load_spec
from smolexport.model.spec import ModelSpec
from tests.core.published_configs import LLAMA32, MISTRAL, PARAMETERS, PUBLISHED, QWEN3, SMOLLM2, SMOLLM3, sized

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY = {
    "llama": SMOLLM2 | SMALL | {"num_key_value_heads": 2, "vocab_size": 50},
    "smollm3": SMOLLM3
    | SMALL
    | {"num_key_value_heads": 2, "vocab_size": 50, "layer_types": None, "no_rope_layers": None, "pad_token_id": 1},
    "mistral": MISTRAL | SMALL | {"num_key_value_heads": 2, "vocab_size": 50},
    "qwen2": PUBLISHED["Qwen2.5-0.5B"] | SMALL | {"num_key_value_heads": 2, "vocab_size": 50},
    "qwen3": QWEN3 | SMALL | {"num_key_value_heads": 2, "vocab_size": 50, "head_dim": 32},
}
LLAMA3 = LLAMA32["rope_scaling"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    LLAMA3,
    YARN,
    YARN | {"beta_fast": 64, "beta_slow": 2, "attention_factor": 1.5},
    YARN | {"truncate": False},
    YARN | {"mscale": 0.8, "mscale_all_dim": 1.2},
]


def config_of(values: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(values))


def state_shapes(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(values))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if values.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return shapes


def spec_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    tensors = list(spec.tensors())
    shapes = {t.stored_name: t.shape for t in tensors}
    assert len(shapes) == len(tensors)
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_exactly_transformers_tensors(name: str) -> None:
    assert spec_shapes(load_spec(PUBLISHED[name])) == state_shapes(PUBLISHED[name])


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_stated_parameters(name: str) -> None:
    assert sum(t.size for t in load_spec(PUBLISHED[name]).tensors()) == PARAMETERS[name]


@pytest.mark.parametrize("name", TINY)
def test_untied_heads_and_biases_match_transformers(name: str) -> None:
    values = TINY[name] | {"tie_word_embeddings": False}
    if name not in ("mistral", "qwen2"):
        values |= {"attention_bias": True}
    if name in ("llama", "smollm3"):
        values |= {"mlp_bias": True}
    assert spec_shapes(load_spec(values)) == state_shapes(values)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("name", TINY)
def test_rotary_frequencies_equal_transformers_in_both_spellings(name: str, scaling: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    base = {k: v for k, v in TINY[name].items() if k not in ("rope_theta", "rope_scaling")}
    old = base | {"rope_theta": 50_000.0, "rope_scaling": scaling}
    new = base | {"rope_parameters": scaling | {"rope_theta": 50_000.0}}
    spec = load_spec(old)
    assert spec == load_spec(new)
    rope = spec.layers[0].mixer.rope
    assert rope is not None
    if scaling["rope_type"] == "default":
        expected, factor = 50_000.0 ** (-np.arange(0, rope.dim, 2) / rope.dim), 1.0
    else:
        tensor, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config_of(new), "cpu")
        expected = tensor.double().numpy()
    np.testing.assert_allclose(rope.inverse_frequencies(), expected, rtol=2e-6)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


def test_old_type_key_means_rope_type() -> None:
    scaling = {"type": "linear", "factor": 2.0}
    assert load_spec(TINY["llama"] | {"rope_scaling": scaling}) == load_spec(
        TINY["llama"] | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    )


def test_smollm3_knows_its_layers_without_rotary() -> None:
    spec = load_spec(SMOLLM3)
    assert [i for i, layer in enumerate(spec.layers) if layer.mixer.rope is None] == list(range(3, 36, 4))
    by_interval = load_spec({k: v for k, v in SMOLLM3.items() if k != "no_rope_layers"})
    assert by_interval == spec
    moved = load_spec(SMOLLM3 | {"no_rope_layers": [0] + [1] * 35})
    assert [layer.mixer.rope is None for layer in moved.layers] == [True] + [False] * 35


def test_published_transformers_default_of_theta() -> None:
    without = {k: v for k, v in TINY["smollm3"].items() if k != "rope_theta"}
    rope = load_spec(without).layers[0].mixer.rope
    assert rope is not None
    assert rope.theta == config_of(without).rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sliding_window_pattern": 3}, "sliding_window_pattern"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"key_of_tomorrow": 1, "another": [2]}, "'another' = [2], 'key_of_tomorrow' = 1; if all are inert, pass"),
        ({"auto_map": {"AutoModel": "evil.py--Model"}}, "never run"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "../../etc"}, "not supported"),
        ({"model_type": "_rope"}, "not supported"),
        ({"model_type": ["llama"]}, "not supported"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 66}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"head_dim": 15}, "head_dim"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "finetuned": True}}, "finetuned"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_theta"),
    ],
)
def test_what_is_not_understood_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_spec(TINY["llama"] | change)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"use_sliding_window": True}, {"layer_types": ["sliding_attention"] * 4}])
@pytest.mark.parametrize("name", ["smollm3", "qwen2", "qwen3"])
def test_windows_are_refused(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"window|layer_types"):
        load_spec(TINY[name] | change)


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"sliding_window": None}, None),
        ({"sliding_window": 32768}, None),  # the context length does not exceed it
        ({"sliding_window": 1024}, 1024),
        ({"sliding_window": ...}, 4096),  # absent
    ],
)
def test_the_window_of_mistral_is_that_of_transformers(change: dict[str, Any], window: int | None) -> None:
    values = {key: value for key, value in (TINY["mistral"] | change).items() if value is not ...}
    assert {layer.mixer.window for layer in load_spec(values).layers} == {window}
    theirs = config_of(values).sliding_window
    assert theirs == window or theirs >= values["max_position_embeddings"]


def test_an_unknown_key_passes_when_vouched_for_or_null() -> None:
    assert load_spec(TINY["llama"] | {"my_note": None}) == load_spec(TINY["llama"])
    assert load_spec(TINY["llama"] | {"my_note": 3}, strict=False) == load_spec(TINY["llama"])
    with pytest.raises(ConfigError, match="--ignore-config my_note"):
        load_spec(TINY["llama"] | {"my_note": 3})


def test_architectures_are_the_files() -> None:
    assert architectures() == ["llama", "mistral", "qwen2", "qwen3", "smollm3"]


def test_explicit_head_dim_sets_the_projections() -> None:
    spec = load_spec(sized(QWEN3, 64, 96, 2, 4, num_key_value_heads=2, head_dim=128))
    shapes = spec_shapes(spec)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (512, 64)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (64, 512)

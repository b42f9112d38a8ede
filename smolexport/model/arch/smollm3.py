"""SmolLM3: Llama with no rotary embedding on some layers (NoPE; every 4th by default)."""

from __future__ import annotations

from smolexport.errors import ConfigError
from smolexport.model.arch._common import read_sizes, refuse_windows
from smolexport.model.arch._config import ConfigReader
from smolexport.model.arch._rope import read_rope
from smolexport.model.spec import Layer, ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """ModelSpec of a SmolLM3ForCausalLM config."""
    sizes = read_sizes(config, tied_by_default=True)
    count, attention_bias = sizes.pop("num_hidden_layers"), config.take("attention_bias", bool, False)
    refuse_windows(config, count)
    rope = read_rope(config, sizes["head_dim"], sizes["context_length"], default_theta=2_000_000.0)
    return ModelSpec(
        model_type="smollm3",
        layers=tuple(Layer(rope if rotary else None) for rotary in _rotary_layers(config, count)),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=config.take("mlp_bias", bool, False),
        **sizes,
    )


def _rotary_layers(config: ConfigReader, count: int) -> list[bool]:
    """One flag per layer: `no_rope_layers` (despite its name 1 = with rotary), else by the interval."""
    interval, flags = config.take("no_rope_layer_interval", int, 4), config.raw("no_rope_layers")
    if flags is None:
        return [(i + 1) % interval != 0 for i in range(count)]
    if not isinstance(flags, list) or len(flags) < count or any(f not in (0, 1) for f in flags):
        raise ConfigError(f"config.json: no_rope_layers should be a list of {count} zeros and ones")
    return [bool(f) for f in flags[:count]]

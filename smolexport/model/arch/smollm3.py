"""SmolLM3: Llama with no rotary embedding on some layers (NoPE; every 4th by default)."""

from __future__ import annotations

from dataclasses import replace

from smolexport.errors import ConfigError
from smolexport.model.arch._config import ConfigReader, read_dense, refuse_windows
from smolexport.model.spec import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """ModelSpec of a SmolLM3ForCausalLM config."""
    refuse_windows(config)
    bias, mlp_bias = config.take("attention_bias", bool, False), config.take("mlp_bias", bool, False)
    spec = read_dense(
        config, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias, default_theta=2_000_000.0, tied_by_default=True
    )
    rotary, layer = _rotary_layers(config, len(spec.layers)), spec.layers[0]
    bare = replace(layer, mixer=replace(layer.mixer, rope=None))
    return replace(spec, layers=tuple(layer if rotates else bare for rotates in rotary))


def _rotary_layers(config: ConfigReader, count: int) -> list[bool]:
    """One flag per layer: `no_rope_layers` (despite its name 1 = with rotary), else by the interval."""
    interval, flags = config.take("no_rope_layer_interval", int, 4), config.raw("no_rope_layers")
    if flags is None:
        return [(i + 1) % interval != 0 for i in range(count)]
    if not isinstance(flags, list) or len(flags) < count or any(f not in (0, 1) for f in flags):
        raise ConfigError(f"config.json: no_rope_layers must be a list of {count} zeros and ones")
    return [bool(f) for f in flags[:count]]

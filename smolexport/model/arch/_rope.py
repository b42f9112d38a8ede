"""The rotary part of config.json in both spellings.

Up to transformers 4: `rope_theta` beside `rope_scaling` (None, or a dict with `type` or `rope_type`).
From transformers 5: one dict `rope_parameters` that holds `rope_theta` too.
Defaults are those of transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math
from typing import Any

from smolexport.errors import ConfigError
from smolexport.model.arch._config import MAX_INT, ConfigReader, checked
from smolexport.model.rope import Linear, Llama3, Rope, Scaling, Yarn
from smolexport.text import show


class _Parameters:
    """The dict of rope parameters, taken key by key like the config around it."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = dict(values)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.pop(key, None)
        if value is None:
            if default is None:
                raise ConfigError(f"config.json: the rope parameter '{key}' is missing")
            return default
        return checked(f"rope parameter {key}", value, float)

    def whole(self, key: str, default: int) -> int:
        value = self.number(key, default)
        if value != int(value) or value > MAX_INT:
            raise ConfigError(f"config.json: the rope parameter {key} = {value} should be a whole number of tokens")
        return int(value)

    def finish(self, kind: str) -> None:
        left = sorted(k for k, v in self.values.items() if v is not None)
        if left:
            raise ConfigError(
                f"config.json: the rope parameter {show(left[0])} = {show(self.values[left[0]])} is not understood "
                f"for rope type {show(kind)}"
            )


def read_rope(config: ConfigReader, head_dim: int, context_length: int, default_theta: float = 10_000.0) -> Rope:
    """The rotary embedding that config.json describes.

    Args:
        config: reader of config.json.
        head_dim: rotated dimensions per head.
        context_length: max_position_embeddings, the default of the original context length.
        default_theta: the family's theta when the config has none.

    Raises:
        ConfigError: a type or parameter that is not understood, or two spellings that contradict each other.
    """
    theta_beside = config.raw("rope_theta")
    parameters = _Parameters(_one_dict(config))
    theta = parameters.number("rope_theta", float(checked("rope_theta", theta_beside or default_theta, float)))
    if theta <= 1:
        raise ConfigError(f"config.json: rope_theta = {theta} should be above 1")
    if theta_beside is not None and theta != theta_beside:
        raise ConfigError(
            f"config.json: rope_theta is {theta_beside}, but {theta} in rope_parameters; keep the true one"
        )
    old, new = parameters.values.pop("type", None), parameters.values.pop("rope_type", None)
    if old is not None and new is not None and old != new:
        raise ConfigError(f"config.json: the rope type is {show(old)} by 'type' and {show(new)} by 'rope_type'")
    if parameters.number("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("config.json: partial_rotary_factor other than 1 is not supported")
    kind = str(new or old or "default")
    scaling = _scaling(kind, parameters, context_length)
    parameters.finish(kind)
    return Rope(theta, head_dim, scaling)


def _one_dict(config: ConfigReader) -> dict[str, Any]:
    scaling, parameters = config.raw("rope_scaling"), config.raw("rope_parameters")
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"config.json: {name} = {show(value)} should be an object")
    if scaling and parameters:
        theta = parameters.get("rope_theta")
        if {**scaling, "rope_theta": theta} != {**parameters, "rope_theta": theta}:
            raise ConfigError("config.json: rope_scaling and rope_parameters contradict each other; keep the true one")
    return dict(parameters or scaling or {})


def _scaling(kind: str, p: _Parameters, context_length: int) -> Scaling:
    match kind:
        case "default" | "none":
            # transformers leaves these behind when a scaling is switched off; without a type they do nothing.
            for key in ("factor", "original_max_position_embeddings"):
                p.values.pop(key, None)
            return None
        case "linear":
            return Linear(p.number("factor"))
        case "llama3":
            low, high = p.number("low_freq_factor", 1.0), p.number("high_freq_factor", 4.0)
            if low >= high:
                raise ConfigError(f"config.json: low_freq_factor {low} should be below high_freq_factor {high}")
            return Llama3(
                factor=p.number("factor", 8.0),
                low_freq_factor=low,
                high_freq_factor=high,
                original_context_length=p.whole("original_max_position_embeddings", context_length),
            )
        case "yarn":
            return _yarn(p, context_length)
        case _:
            raise ConfigError(
                f"config.json: rope type {show(kind)} is not supported; known: default, linear, llama3, yarn"
                + (" (its angles depend on the sequence length)" if kind in ("dynamic", "longrope") else "")
            )


def _yarn(p: _Parameters, context_length: int) -> Yarn:
    original = p.whole("original_max_position_embeddings", context_length)
    factor = p.number("factor", context_length / original)
    if factor < 1:
        raise ConfigError(f"config.json: the rope parameter factor = {factor} should be at least 1 for YaRN")
    mscale, mscale_all = p.values.pop("mscale", None), p.values.pop("mscale_all_dim", None)
    magnitude = _magnitude(factor)
    if mscale and mscale_all:
        numerator, denominator = (
            checked(f"rope parameter {key}", value, float)
            for key, value in (("mscale", mscale), ("mscale_all_dim", mscale_all))
        )
        magnitude = _magnitude(factor, numerator) / _magnitude(factor, denominator)
    truncate = p.values.pop("truncate", True)
    return Yarn(
        factor=factor,
        original_context_length=original,
        attention_factor=p.number("attention_factor", magnitude),
        beta_fast=p.number("beta_fast", 32.0),
        beta_slow=p.number("beta_slow", 1.0),
        truncate=True if truncate is None else checked("rope parameter truncate", truncate, bool),
    )


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

"""All of a checkpoint but its weights: what a converter plans from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolexport.model.spec import ModelSpec, Tensor
from smolexport.tokenizer import TokenizerSpec

CALIBRATION_KEY = "smolexport.calibration"  # in the metadata of every format
DTYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint's small files, read and understood.

    Attributes:
        spec: sizes, layers, tensors.
        tokenizer: its tokenizer.
        name: what people call it.
        folder: where the small files lie.
        config: config.json as read.
        dtype: `F32`, `F16` or `BF16`: what config.json claims, else what most weights are.
        origin: hub id; None for a local folder.
        calibration: what its weights are calibrated with, as JSON for the files' metadata; None = nothing.
        bits: of each matrix, for the scheme `auto-bits`; None = not decided.
        notes: what was taken where the folder leaves a choice, one line each.
    """

    spec: ModelSpec
    tokenizer: TokenizerSpec = field(repr=False)
    name: str
    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    dtype: str = "BF16"
    origin: str | None = None
    calibration: str | None = None
    bits: Mapping[Tensor, int] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()


def claimed_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that config.json claims for the weights, `F32`, `F16` or `BF16`; None without a claim."""
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if isinstance(value, str) and value.removeprefix("torch.") in DTYPES:
            return DTYPES[value.removeprefix("torch.")]
    return None

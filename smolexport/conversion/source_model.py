"""Everything in a checkpoint but its weights: what a converter plans from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolexport.conversion.model_card import installed_version
from smolexport.model.spec import ModelSpec, Tensor
from smolexport.tokenizer import TokenizerSpec

# In the metadata of every format.
SCHEME_KEY, NAME_KEY, CALIBRATION_KEY = "smolexport.scheme", "smolexport.name", "smolexport.calibration"
DTYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint's small files, read and understood.

    Attributes:
        spec: sizes, layers, tensors.
        tokenizer: its tokenizer.
        name: what people call it.
        folder: folder of the small files.
        config: config.json as read.
        dtype: `F32`, `F16` or `BF16`: what config.json claims, else what most weights are.
        origin: hub id; None for a local folder.
        calibration: how its weights are calibrated, as JSON for the files' metadata; None = they are not.
        bits: of each matrix, for the scheme `auto-bits`; None = not decided.
        notes: the choices made where the folder is ambiguous, one line each.
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


def provenance(model: SourceModel, scheme: str, **more: str) -> dict[str, str]:
    """What a file of MLX or ONNX records about itself; `more` goes between name and version."""
    strings = {SCHEME_KEY: scheme, NAME_KEY: model.name.encode("utf-8", "replace").decode(), **more}
    strings["smolexport.version"] = installed_version()
    return {**strings, CALIBRATION_KEY: model.calibration} if model.calibration else strings


def claimed_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that config.json claims for the weights, `F32`, `F16` or `BF16`; None without a claim."""
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if isinstance(value, str) and value.removeprefix("torch.") in DTYPES:
            return DTYPES[value.removeprefix("torch.")]
    return None

"""Models without weights, as a converter sees them: a config.json, a tokenizer, nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from smolexport.conversion.source_model import SourceModel, claimed_dtype
from smolexport.model.arch import architectures
from smolexport.model.checkpoint import read_config
from smolexport.testing.checkpoints import tiny_config, write_tokenizer
from smolexport.tokenizer import TokenizerSpec, read_tokenizer

__all__ = ["FAMILIES", "model_of", "open_model", "tiny_model", "tiny_tokenizer"]

FAMILIES = architectures()


@cache
def tiny_tokenizer() -> TokenizerSpec:
    with TemporaryDirectory() as folder:
        return read_tokenizer(write_tokenizer(Path(folder)), 320)


def model_of(config: Mapping[str, Any], folder: Path, **changes: Any) -> SourceModel:
    """A model with this config.json; its tokenizer is the tiny one, whatever the config says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    read, spec = read_config(folder)
    dtype = claimed_dtype(read) or "BF16"
    return SourceModel(**{"spec": spec, "tokenizer": tiny_tokenizer(), "name": folder.name, "folder": folder,
                    "config": read, "dtype": dtype, **changes})  # fmt: skip


def tiny_model(folder: Path, model_type: str = "llama", *, old_style: bool = True, **overrides: Any) -> SourceModel:
    """A tiny model of one family; rope keys in the old spelling, as for `tiny_config`."""
    return model_of(tiny_config(model_type, old_style=old_style, **overrides), folder)


def open_model(folder: Path, **changes: Any) -> SourceModel:
    """The model in a folder with its own config.json and tokenizer files."""
    config, spec = read_config(folder)
    tokenizer = read_tokenizer(folder, spec.vocab_size)
    return SourceModel(**{"spec": spec, "tokenizer": tokenizer, "name": folder.name, "folder": folder, "config": config,
                    **changes})  # fmt: skip

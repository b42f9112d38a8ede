"""Architectures: one file per `model_type`, and the file name is the registry.

Adding one = adding a file with `read(config: ConfigReader) -> ModelSpec`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from smolexport.errors import ConfigError
from smolexport.model.arch._config import ConfigReader
from smolexport.model.spec import ModelSpec
from smolexport.text import show


def architectures() -> list[str]:
    """The supported `model_type`s."""
    return sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_"))


def load_spec(config: Mapping[str, Any], *, strict: bool = True) -> ModelSpec:
    """The `ModelSpec` that a parsed config.json describes.

    Args:
        config: content of config.json.
        strict: refuse keys that are not understood; False where whoever wrote the file has judged them.

    Raises:
        ConfigError: unknown `model_type`, or a key that is missing, malformed or not understood.
    """
    model_type, known = config.get("model_type"), architectures()
    # Compared with the folder's own listing before anything is imported: the name comes from an untrusted file.
    if model_type not in known:
        near = difflib.get_close_matches(str(model_type), known, 1)
        raise ConfigError(
            f"config.json: model_type {show(model_type)} is not supported; known: {', '.join(known)}"
            + (f" (did you mean '{near[0]}'?)" if near else "")
        )
    if config.get("auto_map"):
        raise ConfigError(
            "config.json: auto_map asks for code from the checkpoint, which is never run; "
            f"if the model is a plain {model_type} all the same, pass --ignore-config auto_map"
        )
    reader = ConfigReader(config)
    spec: ModelSpec = import_module(f"smolexport.model.arch.{model_type}").read(reader)
    if strict:
        reader.finish()
    return spec

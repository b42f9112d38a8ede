"""From an MLX folder to a model of mlx-lm, with all that it would do unasked turned into an error."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from smolexport.errors import FileFormatError, UsageError
from smolexport.files import open_regular
from smolexport.model.checkpoint import read_json
from smolexport.text import failure, label, show

DTYPES: Mapping[str, mx.Dtype] = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
WEIGHTS = "model*.safetensors"  # what mlx-lm loads, whatever an index says


def load_model(folder: Path, dtype: str | None) -> tuple[Any, dict[str, Any]]:
    """The model with its weights in memory, and config.json as mlx-lm understood it.

    Args:
        folder: holds config.json and model*.safetensors.
        dtype: `f32`, `f16`, `bf16`; None: `f32` on a CPU, else as stored.

    Raises:
        UsageError: another dtype, or a path that mlx-lm cannot read.
        CheckpointError: config.json is missing or damaged.
        FileFormatError: whatever keeps mlx-lm from loading exactly the tensors that the config asks for.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype = {dtype!r} should be one of: {', '.join(DTYPES)}")
    if dtype is None and mx.default_device().type == mx.cpu:
        dtype = "f32"
    config = read_json(folder / "config.json", "the folder is not an MLX model")
    _check_config(folder, config, _count_tensors(folder))
    try:
        # Lazily: until every name and shape has been compared with the files, nothing is allocated.
        model, config = mlx_lm.utils.load_model(folder, lazy=True, strict=True)
        _check_dtypes(model)
        if dtype is not None:
            model.set_dtype(DTYPES[dtype])  # parameters alone: rotary frequencies stay in float32
        # Arrays that are still to be computed belong to this thread, and the session may move to another.
        mx.eval(model.parameters())
    except Exception as error:  # mlx-lm raises whatever its parts raise
        raise FileFormatError(f"{folder}: mlx-lm cannot load this folder: {failure(error)}") from error
    return model, config


def config_size(folder: Path, config: Mapping[str, Any], key: str) -> int:
    """A positive number of the config, which composite models keep in `text_config`.

    Raises:
        FileFormatError: missing or not a positive integer.
    """
    text = config.get("text_config")
    value = config.get(key, text.get(key) if isinstance(text, Mapping) else None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FileFormatError(f"{folder / 'config.json'}: {key} is {show(value)}, which should be a positive integer")
    return value


def _check_config(folder: Path, config: Mapping[str, Any], tensors: int) -> None:
    file = folder / "config.json"
    if config.get("model_file") is not None:
        raise FileFormatError(f"{file}: model_file asks for code from the folder, which is never run")
    model_type = config.get("model_type")
    # mlx-lm imports a module of this name.
    if not isinstance(model_type, str) or not re.fullmatch(r"[\w-]+", model_type, re.ASCII):
        raise FileFormatError(f"{file}: model_type is {show(model_type)}, which should name an architecture")
    # Shapes are compared before memory is taken, but layers are built one by one.
    layers = config_size(folder, config, "num_hidden_layers")
    if layers > tensors:
        raise FileFormatError(f"{file}: num_hidden_layers is {show(layers)}, the folder holds only {tensors} tensors")


def _count_tensors(folder: Path) -> int:
    """How many tensors the folder holds, once safetensors itself found nothing wrong with the files' headers."""
    if glob.escape(str(folder)) != str(folder):
        raise UsageError(f"{folder}: mlx-lm cannot read folders with one of *?[ in their path; rename it")
    files: dict[str, Path] = {}
    for path in sorted(folder.glob(WEIGHTS)):
        for name in _tensor_names(path):
            if name in files:
                raise FileFormatError(f"{path}: tensor {label(name)} stands in {files[name].name} too; remove one file")
            files[name] = path
    if not files:
        raise FileFormatError(f"{folder}: no tensors in {WEIGHTS}; pickled weights (*.bin, *.npz) are never opened")
    return len(files)


def _tensor_names(path: Path) -> list[str]:
    try:
        with open_regular(path) as file:
            with safe_open(path, framework="np"):
                pass
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{path}: is damaged or no safetensors file ({failure(error)})") from error
    return [name for name in header if name != "__metadata__"]


def _check_dtypes(model: Any) -> None:
    """Refuse codes where numbers belong; mlx-lm compares names and shapes only.

    Raises:
        ValueError: names the tensor.
    """
    quantized = {name for name, module in model.named_modules() if "scales" in module}
    for name, array in tree_flatten(model.parameters()):
        owner, _, part = name.rpartition(".")
        if owner in quantized and part == "weight":
            fits = array.dtype == mx.uint32
        elif owner in quantized and part == "scales" and array.dtype == mx.uint8:
            fits = True
        else:
            fits = mx.issubdtype(array.dtype, mx.floating)
        if not fits:
            raise ValueError(f"the tensor {label(name)} has dtype {array.dtype}")

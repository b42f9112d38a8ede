"""A sequence on mlx-lm: its models and its key/value caches."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from smolexport.errors import FileFormatError, UnsupportedError, UsageError
from smolexport.files import open_regular
from smolexport.model.checkpoint import read_json
from smolexport.run.session import Session, choose_context, choose_threads
from smolexport.text import failure, label, show

DTYPES: Mapping[str, mx.Dtype] = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
WEIGHTS = "model*.safetensors"  # what mlx-lm loads, whatever an index says
# Tokens computed at once: the CPU keeps a whole matrix of attention weights, and Ctrl-C waits for a block's end.
BLOCK = 512


class MlxSession(Session):
    """One sequence.  Arguments as for `smolexport_on_mlx.open`."""

    LIBRARY = "MLX"

    def __init__(self, folder: Path, threads: int | None, context: int | None, dtype: str | None) -> None:
        choose_threads(threads)  # refuses what no runtime accepts; MLX has no setting
        self._model, config = _load_model(folder, dtype)
        self._cache = _new_cache(folder, self._model)
        trained = _config_size(folder, config, "max_position_embeddings")
        super().__init__(folder, _config_size(folder, config, "vocab_size"), choose_context(context, trained))

    def _forward(self, ids: NDArray[np.int32], last_only: bool) -> NDArray[np.float32]:
        if mx.default_device().type == mx.cpu:
            # For a whole process, so set before each use.  Compiled, MLX would call g++ for a few fused steps and
            # load what it finds under a guessable name in the folder for temporary files; the results are the same.
            mx.disable_compile()
        return self._in_blocks(ids, last_only, BLOCK, self._step)

    def _step(self, ids: NDArray[np.int32], _held: int, rows: NDArray[np.float32]) -> None:
        before = len(ids) - len(rows)  # tokens that need no head
        if before:
            self._compute(ids[:before], head=False)
        if len(rows):
            output = self._compute(ids[before:], head=True)[0].astype(mx.float32)
            if output.shape != rows.shape:  # broadcasting would hide it
                raise ValueError(f"logits of shape {output.shape} instead of {rows.shape}")
            rows[:] = np.array(output)

    def _compute(self, ids: NDArray[np.int32], *, head: bool) -> mx.array:
        """Logits [1, n, v] after `ids`, not evaluated without `head`.

        The cache always is: nothing pending may outlive a call, which may have been the thread's last.
        """
        logits: mx.array = self._model(mx.array(ids)[None], cache=self._cache)
        mx.eval([layer.state for layer in self._cache], [logits] if head else [])
        return logits

    def _truncate(self, length: int) -> None:
        if length == 0:
            self._cache = _new_cache(self._path, self._model)
            return
        for layer in self._cache:  # each by itself: an interrupted forward leaves some longer than others
            layer.trim(layer.offset - length)

    def _release(self) -> None:
        self._model, self._cache = None, []
        mx.clear_cache()  # MLX keeps freed memory for itself otherwise


def _new_cache(folder: Path, model: Any) -> list[Any]:
    """One empty cache a layer, each of which can be rewound."""
    caches = [
        WindowCache(layer.max_size) if isinstance(layer, RotatingKVCache) and layer.keep == 0 else layer
        for layer in make_prompt_cache(model)
    ]
    for layer in caches:
        if not isinstance(layer, KVCache):
            raise UnsupportedError(f"{folder}: a {type(layer).__name__} cannot be rewound, which a session needs")
    return caches


class WindowCache(KVCache):  # type: ignore[misc]
    """All keys and values of a layer with a sliding window: a rotating cache forgets what a rewind needs."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self._window = window

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Mask of the last `count` tokens, as the rotating cache makes it."""
        return super().make_mask(count, return_array=return_array, window_size=window_size or self._window)


def _load_model(folder: Path, dtype: str | None) -> tuple[Any, dict[str, Any]]:
    """The model with its weights in memory, and config.json as mlx-lm understood it.

    Whatever mlx-lm would repair or ignore without a word is an error.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype = {dtype!r} must be one of: {', '.join(DTYPES)}")
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


def _config_size(folder: Path, config: Mapping[str, Any], key: str) -> int:
    """A positive number of the config, which composite models keep in `text_config`."""
    text = config.get("text_config")
    value = config.get(key, text.get(key) if isinstance(text, Mapping) else None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FileFormatError(f"{folder / 'config.json'}: {key} is {show(value)}, not a positive integer")
    return value


def _check_config(folder: Path, config: Mapping[str, Any], tensors: int) -> None:
    file = folder / "config.json"
    if config.get("model_file") is not None:
        raise FileFormatError(f"{file}: model_file asks for code from the folder, which is never run")
    model_type = config.get("model_type")
    # mlx-lm imports a module of this name.
    if not isinstance(model_type, str) or not re.fullmatch(r"[\w-]+", model_type, re.ASCII):
        raise FileFormatError(f"{file}: model_type is {show(model_type)}, not the name of an architecture")
    # Shapes are compared before memory is taken, but layers are built one by one.
    layers = _config_size(folder, config, "num_hidden_layers")
    if layers > tensors:
        raise FileFormatError(f"{file}: num_hidden_layers is {show(layers)}, the folder holds only {tensors} tensors")


def _count_tensors(folder: Path) -> int:
    """How many tensors the folder holds; safetensors itself checks the files' headers."""
    if glob.escape(str(folder)) != str(folder):
        raise UsageError(f"{folder}: mlx-lm cannot read folders with one of *?[ in their path; rename it")
    files: dict[str, Path] = {}
    for path in sorted(folder.glob(WEIGHTS)):
        for name in _tensor_names(path):
            if name in files:
                raise FileFormatError(f"{path}: tensor {label(name)} is in {files[name].name}, too; remove one file")
            files[name] = path
    if not files:
        raise FileFormatError(f"{folder}: no tensors in {WEIGHTS}; pickled weights (*.bin, *.npz) are never opened")
    return len(files)


def _tensor_names(path: Path) -> list[str]:
    try:
        with open_regular(path), safe_open(path, framework="np") as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{path}: is damaged or not a safetensors file ({failure(error)})") from error


def _check_dtypes(model: Any) -> None:
    """Refuse codes where numbers belong; mlx-lm compares names and shapes only."""
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

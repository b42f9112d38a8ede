"""From a checkpoint's folder to a transformers model, with every silent repair turned into an error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from smolexport.errors import CheckpointError, TensorError, UsageError
from smolexport.model.checkpoint import claimed_quantization, read_json, weight_files
from smolexport.model.source_files import refuse_links
from smolexport.model.spec import NAMES, Role
from smolexport.model.tensor_file import stored_tensors
from smolexport.text import first_line, printable, show

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}

# transformers' own default, so these are the numbers that a user of the checkpoint gets; the softmax stays in
# float32 and no [n, n] matrix is kept, which "eager" does.
ATTENTION = "sdpa"


def load_model(folder: Path, dtype: str, weights: Iterable[tuple[str, NDArray[Any] | torch.Tensor]] | None) -> Any:
    """The model in evaluation mode, with exactly the tensors that its config requires.

    The dtype goes through the loader and never through `.to(...)`: that would round the rotary frequencies, which
    the loader keeps in float32.  `weights` replace the files; a torch tensor among them is used without a copy.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype = {dtype!r} must be one of: {', '.join(DTYPES)}")
    refuse_links(folder)
    stored = read_json(folder / "config.json", "give the folder of a checkpoint")
    options: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "local_files_only": True,
        "use_safetensors": True,
        "attn_implementation": ATTENTION,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported below, by name
    }
    state = None if weights is None else {name: _tensor(name, array, DTYPES[dtype]) for name, array in weights}
    files = weight_files(folder)[0] if state is None else ()
    names = state or {tensor.name for path in files for tensor in stored_tensors(path, claimed_quantization(stored))}
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            config = _settled(config, stored, names)
            kind = AutoModelForCausalLM._model_mapping[type(config)]  # AutoModelForCausalLM itself insists on a folder
            model, info = kind.from_pretrained(folder if files else None, config=config, state_dict=state, **options)
        except Exception as error:  # transformers raises whatever its parts raise
            raise CheckpointError(
                f"{folder}: transformers cannot load this checkpoint: {type(error).__name__}: {first_line(error)}"
            ) from error
    _check_loading(folder, info)
    return model.eval()


def _settled(config: Any, stored: Mapping[str, Any], names: Collection[str]) -> Any:
    """`config`, which was read from `stored`, for plain tensors of these `names`.

    Where config.json claims quantization, transformers would quantize them.  A head that is neither stored nor tied
    would be filled with random numbers: unless config.json forbids it, the embedding is the head.
    """
    config.__dict__.pop("quantization_config", None)
    if stored.get("tie_word_embeddings") is None and f"{NAMES[Role.HEAD]}.weight" not in names:
        config.tie_word_embeddings = True
    return config


def _check_loading(folder: Path, info: dict[str, Any]) -> None:
    """transformers fills gaps with random numbers and drops unknown tensors; here both are errors."""
    for key, what in (
        ("missing_keys", "is missing"),
        ("unexpected_keys", "is not part of this architecture"),
        ("mismatched_keys", "does not have the shape that the config requires"),
    ):
        found = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get(key) or ())
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise TensorError(f"{folder}: the tensor {show(found[0])} {what}{more}")
    if info.get("error_msgs"):
        raise TensorError(f"{folder}: {printable(str(info['error_msgs']), 300)}")


def _tensor(name: str, array: NDArray[Any] | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of `array` as `dtype`; NumPy's bfloat16 comes from ml_dtypes, which torch does not know."""
    if isinstance(array, torch.Tensor):
        return array
    if array.dtype.name == "bfloat16":
        bits = torch.tensor(np.ascontiguousarray(array).view(np.uint16))
        return bits.view(torch.bfloat16).to(dtype)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise TensorError(f"the tensor {show(name)} has dtype {array.dtype}; give float32, float16 or bfloat16")
    return torch.tensor(np.ascontiguousarray(array)).to(dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no loading report: what they would report is an error here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def use_threads(count: int) -> None:
    """Compute with `count` threads from now on: torch has one setting per process."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Compute with `count` threads inside, and with as many as before afterwards."""
    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        use_threads(before)

"""A graph in ONNX Runtime, compared with what config.json says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from smolexport.errors import FileFormatError
from smolexport.run.session import cores_to_spare
from smolexport.text import label, reason, show
from smolexport_on_onnxruntime._folder import Sizes

FLOATS: Mapping[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
OPTIONAL = {"position_ids", "num_logits_to_keep"}
NOTHING = 4  # level of the log at which errors stay silent: they are raised as well


def load(path: Path, *, threads: int, spinning: bool | None) -> Any:
    """ONNX Runtime's session for the graph `path`, on the CPU; `spinning` None: if `cores_to_spare`.

    Raises:
        FileFormatError: whatever keeps it from being opened.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = NOTHING
    busily = threads > 1 and (cores_to_spare(threads) if spinning is None else spinning)
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if busily else "0")
    providers = ["CPUExecutionProvider"]
    try:
        # No second attempt, which would print; no options out of the file, whatever the environment says.
        return ort.InferenceSession(str(path), options, providers, enable_fallback=0, read_config_from_model=0)
    except Exception as error:  # ONNX Runtime raises a class of its own for each of its codes
        raise FileFormatError(f"{path}: ONNX Runtime cannot load this graph: {reason(error)}") from error


def inputs_of(session: Any) -> dict[str, Any]:
    """What can be fed, by name, with what need not be: an input that has a value of its own in the file."""
    optional = (value for value in session.get_overridable_initializers() if value.name in OPTIONAL)
    return {value.name: value for value in (*session.get_inputs(), *optional)}


def check_interface(path: Path, session: Any, sizes: Sizes) -> None:
    """Compare the inputs and outputs of the graph with the sizes that config.json tells.

    Raises:
        FileFormatError: they differ, or an input is not known.
    """
    inputs = {name: (value.type, value.shape) for name, value in inputs_of(session).items()}
    outputs = {value.name: (value.type, value.shape) for value in session.get_outputs()}
    for name in ("input_ids", "attention_mask", *(OPTIONAL & inputs.keys())):
        if inputs.pop(name, ("nothing",))[0] != "tensor(int64)":
            raise FileFormatError(f"{path}: should have the input {name}, of int64")
    values = {"logits": (outputs.pop("logits", ("nothing", [])), {-1: sizes.vocab_size})}
    cache = {1: sizes.kv_heads, 3: sizes.head_dim}
    for layer in range(sizes.layers):
        for part in ("key", "value"):
            for group, name in ((inputs, f"past_key_values.{layer}.{part}"), (outputs, f"present.{layer}.{part}")):
                values[name] = group.pop(name, ("nothing", [])), cache
    if inputs or outputs:
        name = label(next(iter({**inputs, **outputs})))
        raise FileFormatError(f"{path}: {name} is not known, or not by config.json")
    for name, ((kind, shape), expected) in values.items():
        rank = 3 if name == "logits" else 4
        if kind not in FLOATS or len(shape) != rank or any(shape[axis] != size for axis, size in expected.items()):
            wanted = ", ".join(f"{size} along axis {axis % rank}" for axis, size in expected.items())
            raise FileFormatError(f"{path}: {name} is {kind} of shape {show(shape)}, but config.json asks for {wanted}")

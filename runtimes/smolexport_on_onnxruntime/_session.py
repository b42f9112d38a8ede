"""A sequence on ONNX Runtime: one buffer for each layer's keys and values, bound as past and as present.

GroupQueryAttention then writes new rows in place, and the length of the attention mask tells it how many rows count.
So a rewind is nothing but a shorter mask, and nothing is copied from token to token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from smolexport.errors import FileFormatError, UsageError
from smolexport.run.session import Session, choose_context, choose_threads
from smolexport.text import label, reason, show
from smolexport_on_onnxruntime.checks import CheckedGraph, check_folder, spins

# Tokens computed at once, the fastest of 16 to 512.  Attention keeps a matrix of block x length for each head, and
# Ctrl-C waits for a block's end.
BLOCK = 128
FLOATS: Mapping[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
OPTIONAL = {"position_ids", "num_logits_to_keep"}
NOTHING = 4  # level of the log at which errors stay silent: they are raised as well


class OnnxSession(Session):
    """One sequence.  Arguments as for `smolexport_on_onnxruntime.open`.

    A graph that was exported for the last row alone runs token by token when all rows are requested.
    """

    LIBRARY = "ONNX Runtime"

    def __init__(
        self, path: Path, threads: int | None, context: int | None, graph: str | None, spinning: bool | None
    ) -> None:
        threads = choose_threads(threads)
        checked = check_folder(path, graph)
        super().__init__(checked.folder, checked.vocab_size, choose_context(context, checked.context_length))
        self._session: Any = load(checked.path, threads, spinning)
        _check_interface(checked, self._session)
        self._buffers: list[NDArray[Any]] = []
        try:
            self._bind()
        except (MemoryError, ValueError) as error:  # the latter for sizes beyond any address
            raise UsageError(
                f"{checked.path}: no memory for the caches of {self.context} tokens; give a smaller context"
            ) from error

    def _bind(self) -> None:
        """Allocate what the session keeps and bind what never changes."""
        self._binding = self._session.io_binding()
        inputs = _inputs(self._session)
        outputs = {value.name: value for value in self._session.get_outputs()}
        self._dtype = FLOATS[outputs["logits"].type]
        self._last_row_graph = outputs["logits"].shape[1] == 1
        self._mask = np.ones(self.context, np.int64)
        self._positions = np.arange(self.context, dtype=np.int64) if "position_ids" in inputs else None
        self._keep = None
        if "num_logits_to_keep" in inputs:
            self._keep = np.zeros(1, np.int64)
            self._bind_input("num_logits_to_keep", self._keep, inputs["num_logits_to_keep"].shape)
        for name, value in inputs.items():
            if name.startswith("past_key_values."):
                shape = (1, value.shape[1], self.context, value.shape[3])
                buffer = np.zeros(shape, FLOATS[value.type])
                self._buffers.append(buffer)
                self._bind_input(name, buffer, shape)
                self._bind_output(name.replace("past_key_values.", "present."), buffer, shape)

    def _forward(self, ids: NDArray[np.int32], last_only: bool) -> NDArray[np.float32]:
        if self._keep is not None:
            self._keep[0] = last_only
        block = 1 if self._last_row_graph and not last_only else BLOCK
        return self._in_blocks(ids, last_only, block, self._step)

    def _step(self, tokens: NDArray[np.int32], held: int, rows: NDArray[np.float32]) -> None:
        ids = tokens.astype(np.int64)
        count = 1 if self._last_row_graph or (self._keep is not None and self._keep[0]) else len(ids)
        if count == len(rows) and self._dtype is np.float32:  # the graph writes into the caller's array
            self._run(ids, held, rows)
        else:
            made = np.empty((count, self.vocab_size), self._dtype)
            self._run(ids, held, made)
            rows[:] = made[count - len(rows) :]

    def _run(self, ids: NDArray[np.int64], held: int, logits: NDArray[Any]) -> None:
        """One pass over `ids` after `held` tokens; the graph writes its rows into `logits`."""
        total = held + len(ids)
        self._bind_input("input_ids", ids, (1, len(ids)))
        self._bind_input("attention_mask", self._mask, (1, total))
        if self._positions is not None:
            self._bind_input("position_ids", self._positions[held:total], (1, len(ids)))
        self._bind_output("logits", logits, (1, *logits.shape))
        self._session.run_with_iobinding(self._binding)

    def _bind_input(self, name: str, array: NDArray[Any], shape: Sequence[int]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any], shape: Sequence[int]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    def _truncate(self, length: int) -> None:
        """The attention mask leaves out rows beyond the length, also those of an interrupted call."""

    def _release(self) -> None:
        self._binding = self._session = None
        self._buffers = []


def load(path: Path, threads: int, spinning: bool | None) -> Any:
    """ONNX Runtime's session for the graph `path`, on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = NOTHING
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins(threads, spinning))))
    providers = ["CPUExecutionProvider"]
    try:
        # No second attempt, which would print; no options out of the file, whatever the environment says.
        return ort.InferenceSession(str(path), options, providers, enable_fallback=0, read_config_from_model=0)
    except Exception as error:  # ONNX Runtime raises a class of its own for each of its codes
        raise FileFormatError(f"{path}: ONNX Runtime cannot load this graph: {reason(error)}") from error


def _inputs(session: Any) -> dict[str, Any]:
    """The inputs by name; also those of OPTIONAL that have a default in the file."""
    optional = (value for value in session.get_overridable_initializers() if value.name in OPTIONAL)
    return {value.name: value for value in (*session.get_inputs(), *optional)}


def _check_interface(graph: CheckedGraph, session: Any) -> None:
    """Compare the inputs and outputs of the graph with the sizes in config.json."""
    path = graph.path
    inputs = {name: (value.type, value.shape) for name, value in _inputs(session).items()}
    outputs = {value.name: (value.type, value.shape) for value in session.get_outputs()}
    for name in ("input_ids", "attention_mask", *(OPTIONAL & inputs.keys())):
        if inputs.pop(name, ("nothing",))[0] != "tensor(int64)":
            raise FileFormatError(f"{path}: has no input {name} of int64")
    values = {"logits": (outputs.pop("logits", ("nothing", [])), {-1: graph.vocab_size})}
    cache = {1: graph.kv_heads, 3: graph.head_dim}
    for layer in range(graph.layers):
        for part in ("key", "value"):
            for group, name in ((inputs, f"past_key_values.{layer}.{part}"), (outputs, f"present.{layer}.{part}")):
                values[name] = group.pop(name, ("nothing", [])), cache
    if inputs or outputs:
        name = label(next(iter({**inputs, **outputs})))
        raise FileFormatError(f"{path}: {name} is not known, or not by config.json")
    for name, ((kind, shape), expected) in values.items():
        rank = 3 if name == "logits" else 4
        if kind not in FLOATS or len(shape) != rank or any(shape[axis] != size for axis, size in expected.items()):
            needed = ", ".join(f"{size} along axis {axis % rank}" for axis, size in expected.items())
            raise FileFormatError(f"{path}: {name} is {kind} of shape {show(shape)}, but config.json requires {needed}")

"""A sequence on ONNX Runtime GenAI: its generator fed with tokens, its logits read as the graph wrote them.

The library keeps one buffer for past and present, so a rewind is cheap; it never draws a token here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray

from smolexport.errors import FileFormatError
from smolexport.run.session import Session, choose_context, choose_threads
from smolexport.text import reason
from smolexport_on_onnxruntime.checks import CheckedGraph, check_folder, spins
from smolexport_on_onnxruntime_genai._config import check_config

BLOCK = 256  # tokens computed at once: the library makes the logits of all of them, and Ctrl-C waits for a block's end
NOTHING = 4  # level of the log at which errors stay silent: they are raised as well


class GenaiSession(Session):
    """One sequence.  Arguments as for `smolexport_on_onnxruntime_genai.open`.

    A graph that was exported for the last row alone runs token by token when all rows are requested.
    """

    LIBRARY = "ONNX Runtime GenAI"

    def __init__(
        self, path: Path, threads: int | None, context: int | None, graph: str | None, spinning: bool | None
    ) -> None:
        threads = choose_threads(threads)
        checked = check_folder(path, graph)
        check_config(checked)
        super().__init__(checked.folder, checked.vocab_size, choose_context(context, checked.context_length))
        try:
            self._generator: Any = _load(checked, threads, self.context, spins(threads, spinning))
            self._last_row_graph = self._probe(checked)
        except Exception as error:
            raise FileFormatError(f"{checked.path}: ONNX Runtime GenAI cannot run it: {reason(error)}") from error

    def _forward(self, ids: NDArray[np.int32], last_only: bool) -> NDArray[np.float32]:
        return self._in_blocks(ids, last_only, 1 if self._last_row_graph and not last_only else BLOCK, self._step)

    def _step(self, ids: NDArray[np.int32], _held: int, rows: NDArray[np.float32]) -> None:
        self._generator.append_tokens(ids[None])
        if len(rows):
            rows[:] = self._generator.get_output("logits")[0, -len(rows) :]

    def _truncate(self, length: int) -> None:
        self._generator.rewind_to(length)

    def _release(self) -> None:
        self._generator = None

    def _probe(self, checked: CheckedGraph) -> bool:
        """Whether the graph makes the last row alone, seen from two tokens that are forgotten again.

        The library takes the caches' shape from the graph, so it is compared with config.json here.
        """
        count = min(2, self.context)
        self._generator.append_tokens(np.zeros((1, count), np.int32))
        shape = self._generator.get_output("logits").shape
        cache = self._generator.get_output("present.0.key").shape
        self._generator.rewind_to(0)
        if shape not in ((1, count, self.vocab_size), (1, 1, self.vocab_size)):
            raise ValueError(f"logits of shape {shape} for {count} tokens, with a vocabulary of {self.vocab_size}")
        if (cache[1], cache[3]) != (checked.kv_heads, checked.head_dim):
            raise ValueError(f"caches of shape {cache}, with {checked.kv_heads} heads of {checked.head_dim}")
        return bool(shape[1] == 1)


def _load(checked: CheckedGraph, threads: int, context: int, spinning: bool) -> Any:
    """The library's generator for the graph; it keeps alive what it needs."""
    if hasattr(og, "disable_telemetry_events"):
        og.disable_telemetry_events()
    config = og.Config(str(checked.folder))
    config.clear_providers()
    options = {
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
        "log_severity_level": NOTHING,
        "session.intra_op.allow_spinning": str(int(spinning)),
    }
    decoder = {"filename": checked.path.relative_to(checked.folder).as_posix(), "session_options": options}
    config.overlay(json.dumps({"model": {"decoder": decoder}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=context, batch_size=1, do_sample=False, past_present_share_buffer=True)
    return og.Generator(model, params)

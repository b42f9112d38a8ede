"""A sequence on ONNX Runtime GenAI: its generator fed by hand, its logits read as the graph wrote them.

The library keeps one buffer for past and present, so that rewinding moves a mark; it never draws a token here.

Notation: n = tokens appended in one call, v = vocab_size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray

from smolexport.errors import FileFormatError, SessionClosedError, SessionError
from smolexport.run.session import TextCodec, choose_context, choose_threads, cores_to_spare, token_array
from smolexport.text import reason
from smolexport_on_onnxruntime.checks import CheckedGraph, check_folder
from smolexport_on_onnxruntime_genai._config import check_config

BLOCK = 256  # tokens computed at once: the library makes the logits of all of them, and Ctrl-C waits for a block's end
NOTHING = 4  # level of the log at which errors stay silent: they are raised as well


class GenaiSession:
    """One sequence.  Arguments as for `smolexport_on_onnxruntime_genai.open`."""

    def __init__(
        self, path: Path, *, threads: int | None, context: int | None, graph: str | None, spinning: bool | None
    ) -> None:
        threads = choose_threads(threads)
        checked = check_folder(path, graph)
        self._folder = checked.folder
        check_config(checked)
        self._context = choose_context(context, checked.context_length)
        self._vocab_size = checked.sizes.vocab_size
        self._codec: TextCodec | None = None
        self._length = 0
        busily = threads > 1 and (cores_to_spare(threads) if spinning is None else spinning)
        try:
            self._generator: Any = _load(checked, threads, self._context, busily)
            self._last_row_graph = self._probe(checked.sizes.kv_heads, checked.sizes.head_dim)
        except Exception as error:
            raise FileFormatError(f"{checked.path}: ONNX Runtime GenAI cannot run it: {reason(error)}") from error

    @property
    def vocab_size(self) -> int:
        """Width of a row of logits."""
        return self._vocab_size

    @property
    def context(self) -> int:
        """Most tokens that the session holds."""
        return self._context

    @property
    def length(self) -> int:
        """Tokens held now."""
        return self._length

    @property
    def codec(self) -> TextCodec:
        """The folder's own tokenizer, read from tokenizer.json when first asked for.

        Raises:
            TokenizerError: the folder has none, or one that is not understood.
        """
        from smolexport.tokenizer import open_tokenizer, read_tokenizer

        if self._codec is None:
            self._codec = open_tokenizer(self._folder, read_tokenizer(self._folder, self._vocab_size))
        return self._codec

    def append(self, tokens: Sequence[int] | NDArray[np.integer], *, last_only: bool = False) -> NDArray[np.float32]:
        """Feed `tokens`, return the logits [n, v] after each, or only the last row [1, v].

        A graph in f16 computes its logits so; they come back widened, not recomputed.  A graph that was exported for
        the last row alone is asked token by token when all rows are wanted.

        Raises:
            SessionClosedError: after `close`.
            SessionError: no tokens, an id outside the vocabulary, or the library failed; nothing is appended then.
            ContextOverflowError: before anything is computed.
        """
        self._check_open()
        ids = token_array(tokens, held=self._length, context=self._context, vocab_size=self._vocab_size)
        try:
            logits = self._forward(ids, last_only)
        except BaseException as error:  # also Ctrl-C between two blocks
            self._generator.rewind_to(self._length)
            if not isinstance(error, Exception):
                raise
            raise SessionError(f"{self._folder}: ONNX Runtime GenAI failed: {reason(error)}") from error
        self._length += len(ids)
        return logits

    def rewind(self, length: int) -> None:
        """Forget all tokens from position `length` on.

        Raises:
            SessionClosedError: after `close`.
            SessionError: unless 0 <= length <= self.length.
        """
        self._check_open()
        if not 0 <= length <= self._length:
            raise SessionError(f"rewind: {length} should lie between 0 and the {self._length} tokens held")
        self._generator.rewind_to(length)
        self._length = length

    def close(self) -> None:
        """Free the model; a second call does nothing."""
        self._generator = None

    def __enter__(self) -> GenaiSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _forward(self, ids: NDArray[np.int32], last_only: bool) -> NDArray[np.float32]:
        n = len(ids)
        logits = np.empty((1 if last_only else n, self._vocab_size), np.float32)
        block = 1 if self._last_row_graph and not last_only else BLOCK
        for start in range(0, n, block):
            part = ids[start : start + block]
            self._generator.append_tokens(part[None])
            rows = logits[-1:] if last_only else logits[start : start + block]
            rows[:] = self._generator.get_output("logits")[0, -len(rows) :]
        return logits

    def _probe(self, kv_heads: int, head_dim: int) -> bool:
        """Whether the graph makes the last row alone, seen from two tokens that are forgotten again.

        The library takes the caches' shape from the graph, whatever the folder's configurations say.

        Raises:
            ValueError: the logits or the caches have other shapes than config.json promises.
        """
        made = min(2, self._context)
        self._generator.append_tokens(np.zeros((1, made), np.int32))
        shape = self._generator.get_output("logits").shape
        cache = self._generator.get_output("present.0.key").shape
        self._generator.rewind_to(0)
        if shape not in ((1, made, self._vocab_size), (1, 1, self._vocab_size)):
            raise ValueError(f"logits of shape {shape} for {made} tokens, with a vocabulary of {self._vocab_size}")
        if (cache[1], cache[3]) != (kv_heads, head_dim):
            raise ValueError(f"caches of shape {cache}, with {kv_heads} heads of {head_dim}")
        return bool(shape[1] == 1)

    def _check_open(self) -> None:
        if self._generator is None:
            raise SessionClosedError(f"{self._folder}: the session is closed; open it again")


def _load(checked: CheckedGraph, threads: int, context: int, spinning: bool) -> Any:
    """The library's generator for the graph, which keeps what it needs alive."""
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

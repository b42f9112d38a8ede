"""A sequence on ONNX Runtime: one buffer for each layer's keys and values, bound as past and as present.

GroupQueryAttention then writes new rows in place, and the length of the attention mask tells it how many rows count.
So a rewind is nothing but a shorter mask, and nothing is copied from token to token.

Notation: n = tokens appended in one call, v = vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import SessionClosedError, SessionError, UsageError
from smolexport.run.session import TextCodec, choose_context, choose_threads, token_array
from smolexport.text import reason
from smolexport_on_onnxruntime._load import FLOATS, check_interface, inputs_of, load
from smolexport_on_onnxruntime.checks import check_folder

# Tokens computed at once, the fastest of 16 to 512.  Attention keeps a matrix of block x length for each head, and
# Ctrl-C waits for a block's end.
BLOCK = 128


class OnnxSession:
    """One sequence.  Arguments as for `smolexport_on_onnxruntime.open`."""

    def __init__(
        self, path: Path, *, threads: int | None, context: int | None, graph: str | None, spinning: bool | None
    ) -> None:
        threads = choose_threads(threads)
        checked = check_folder(path, graph)
        self._folder = checked.folder
        self._context = choose_context(context, checked.context_length)
        self._session: Any = load(checked.path, threads=threads, spinning=spinning)
        check_interface(checked.path, self._session, checked.sizes)
        self._vocab_size = checked.sizes.vocab_size
        self._codec: TextCodec | None = None
        self._length = 0
        self._binding: Any = None
        self._buffers: list[NDArray[Any]] = []
        try:
            self._bind()
        except (MemoryError, ValueError) as error:  # the latter for sizes beyond any address
            raise UsageError(
                f"{checked.path}: no memory for the caches of {self._context} tokens; give a smaller context"
            ) from error

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
            SessionError: no tokens, an id outside the vocabulary, or ONNX Runtime failed; nothing is appended then.
            ContextOverflowError: before anything is computed.
        """
        self._check_open()
        ids = token_array(tokens, held=self._length, context=self._context, vocab_size=self._vocab_size)
        try:
            logits = self._forward(ids.astype(np.int64), last_only)
        except Exception as error:  # ONNX Runtime raises a class of its own for each of its codes
            raise SessionError(f"{self._folder}: ONNX Runtime failed: {reason(error)}") from error
        self._length += len(ids)  # only now: rows that an interrupted call has written do not count
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
        self._length = length

    def close(self) -> None:
        """Free the model; a second call does nothing."""
        self._binding = self._session = None
        self._buffers = []

    def __enter__(self) -> OnnxSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _bind(self) -> None:
        """Allocate what the session keeps and bind what never changes."""
        self._binding = self._session.io_binding()
        inputs = inputs_of(self._session)
        outputs = {value.name: value for value in self._session.get_outputs()}
        self._dtype = FLOATS[outputs["logits"].type]
        self._last_row_graph = outputs["logits"].shape[1] == 1
        self._mask = np.ones(self._context, np.int64)
        self._positions = np.arange(self._context, dtype=np.int64) if "position_ids" in inputs else None
        self._keep = None
        if "num_logits_to_keep" in inputs:
            self._keep = np.zeros(1, np.int64)
            self._bind_input("num_logits_to_keep", self._keep, inputs["num_logits_to_keep"].shape)
        for name, value in inputs.items():
            if name.startswith("past_key_values."):
                shape = (1, value.shape[1], self._context, value.shape[3])
                buffer = np.zeros(shape, FLOATS[value.type])
                self._buffers.append(buffer)
                self._bind_input(name, buffer, shape)
                self._bind_output(name.replace("past_key_values.", "present."), buffer, shape)

    def _forward(self, ids: NDArray[np.int64], last_only: bool) -> NDArray[np.float32]:
        n = len(ids)
        logits = np.empty((1 if last_only else n, self._vocab_size), np.float32)
        one_row = self._last_row_graph or (last_only and self._keep is not None)
        block = 1 if self._last_row_graph and not last_only else BLOCK
        if self._keep is not None:
            self._keep[0] = last_only
        # The model writes into the caller's array where it makes exactly the rows that are wanted.
        direct = self._dtype is np.float32 and (one_row or not last_only or n == 1)
        spare = None if direct else np.empty((1 if one_row else min(n, block), self._vocab_size), self._dtype)
        for start in range(0, n, block):
            part = ids[start : start + block]
            rows = logits[-1:] if last_only else logits[start : start + block]
            made = rows if spare is None else spare[: 1 if one_row else len(part)]
            self._run(part, self._length + start, made)
            if spare is not None:
                rows[:] = made[-len(rows) :]
        return logits

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

    def _check_open(self) -> None:
        if self._session is None:
            raise SessionClosedError(f"{self._folder}: the session is closed; open it again")

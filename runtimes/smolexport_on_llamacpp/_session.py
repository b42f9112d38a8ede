"""A sequence on llama.cpp.

Everything that llama.cpp answers by ending the process (ids outside the vocabulary, batches beyond n_batch) is
checked here first.

Notation: n = tokens appended in one call, v = vocab_size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import SessionError, UsageError
from smolexport.run.session import choose_context, choose_threads, token_array
from smolexport_on_llamacpp._codec import VocabCodec
from smolexport_on_llamacpp._library import Model, call, last_errors, library, raise_interruption

SEQUENCE = 0


class LlamaSession:
    """One sequence.  Arguments as for `smolexport_on_llamacpp.open`."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None,
        context: int | None,
        kv_type: str,
        flash_attention: bool | None,
        batch: int,
        gpu_layers: int,
    ) -> None:
        lib = library()
        kinds = {"f16": lib.GGML_TYPE_F16, "f32": lib.GGML_TYPE_F32}
        if kv_type not in kinds:
            raise UsageError(f"kv_type = {kv_type!r} should be one of: {', '.join(kinds)}")
        if batch < 1:
            raise UsageError(f"batch = {batch} should be at least 1")
        if not -1 <= gpu_layers < 2**31:
            raise UsageError(f"gpu_layers = {gpu_layers} should be a number of layers, or -1 for all")
        count = choose_threads(threads)
        self._path, self._lib = path, lib
        self._model = Model(path, gpu_layers)
        try:
            self._context = choose_context(context, self._model.trained_context)
            self._batch = min(batch, self._context)
            params = lib.llama_context_default_params()
            params.n_ctx = self._context
            params.n_batch = params.n_ubatch = self._batch
            params.n_threads = params.n_threads_batch = count
            params.type_k = params.type_v = kinds[kv_type]
            params.flash_attn_type = _flash(lib, flash_attention)
            params.offload_kqv = params.op_offload = gpu_layers != 0
            self._pointer = self._model.make_context(params)
            if not self._pointer:
                raise SessionError(f"{path}: llama.cpp cannot make a context of {self._context}: {last_errors()}")
        except BaseException:
            self._model.close()
            raise
        self._memory = lib.llama_get_memory(self._pointer)
        self._codec = VocabCodec(self._model)
        self._length = 0

    @property
    def vocab_size(self) -> int:
        """Width of a row of logits."""
        return self._model.vocab_size

    @property
    def context(self) -> int:
        """Most tokens that the session holds."""
        return self._context

    @property
    def length(self) -> int:
        """Tokens held now."""
        return self._length

    @property
    def codec(self) -> VocabCodec:
        """The tokenizer in the file; usable until `close`."""
        return self._codec

    def append(self, tokens: Sequence[int] | NDArray[np.integer], *, last_only: bool = False) -> NDArray[np.float32]:
        """Feed `tokens`, return the logits [n, v] after each, or only the last row [1, v].

        Raises:
            SessionClosedError: after `close`.
            SessionError: no tokens, an id outside the vocabulary, or llama.cpp failed; nothing is appended then.
            ContextOverflowError: before anything is computed.
        """
        self._model.check_open()
        ids = token_array(tokens, held=self._length, context=self._context, vocab_size=self.vocab_size)
        logits = np.empty((1 if last_only else len(ids), self.vocab_size), np.float32)
        try:
            for start in range(0, len(ids), self._batch):
                part = ids[start : start + self._batch]
                last = start + len(part) == len(ids)
                wanted = int(last) if last_only else len(part)
                self._decode(part, wanted)
                self._read(logits[:wanted] if last_only else logits[start : start + wanted])
        except BaseException:
            self._lib.llama_memory_seq_rm(self._memory, SEQUENCE, self._length, -1)
            raise
        self._length += len(ids)
        return logits

    def rewind(self, length: int) -> None:
        """Forget all tokens from position `length` on.

        Raises:
            SessionClosedError: after `close`.
            SessionError: unless 0 <= length <= self.length.
        """
        self._model.check_open()
        if not 0 <= length <= self._length:
            raise SessionError(f"rewind: {length} should lie between 0 and the {self._length} tokens held")
        if not self._lib.llama_memory_seq_rm(self._memory, SEQUENCE, length, -1):
            raise SessionError(f"{self._path}: llama.cpp cannot rewind this model's cache to {length}")
        self._length = length

    def close(self) -> None:
        """Free the model and its cache; a second call does nothing."""
        self._model.close()

    def __enter__(self) -> LlamaSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _decode(self, ids: NDArray[np.int32], wanted: int) -> None:
        """Compute one batch, with logits of its last `wanted` tokens.

        Positions and the sequence are left to llama.cpp, which goes on where the cache ends.
        """
        n = len(ids)
        batch = self._lib.llama_batch(n_tokens=n, token=(ctypes.c_int32 * n)(*ids.tolist()))
        batch.logits = (ctypes.c_int8 * n)(*bytes(n - wanted), *b"\1" * wanted)
        status = call(self._lib.llama_decode, self._pointer, batch)
        raise_interruption()
        if status != 0:
            raise SessionError(f"{self._path}: llama_decode failed with status {status}: {last_errors()}")

    def _read(self, rows: NDArray[np.float32]) -> None:
        """Copy the wanted rows out of llama.cpp's buffer, where they lie one after another."""
        if rows.size:
            ctypes.memmove(rows.ctypes.data, self._lib.llama_get_logits(self._pointer), rows.nbytes)


def _flash(lib: object, choice: bool | None) -> int:
    name = {None: "AUTO", True: "ENABLED", False: "DISABLED"}[choice]
    return int(getattr(lib, f"LLAMA_FLASH_ATTN_TYPE_{name}"))

"""A sequence on llama.cpp.

Everything for which llama.cpp would end the process (ids outside the vocabulary, batches beyond n_batch) is checked
here first.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import SessionError, UsageError
from smolexport.run.session import Session, choose_context, choose_threads
from smolexport_on_llamacpp._codec import VocabCodec
from smolexport_on_llamacpp._library import Model, call, last_errors, library, raise_interruption

SEQUENCE = 0


class LlamaSession(Session):
    """One sequence.  Arguments as for `smolexport_on_llamacpp.open`."""

    LIBRARY = "llama.cpp"

    def __init__(
        self,
        path: Path,
        threads: int | None,
        context: int | None,
        kv_type: str,
        flash_attention: bool | None,
        batch: int,
        gpu_layers: int,
    ) -> None:
        lib = library()
        types = {"f16": lib.GGML_TYPE_F16, "f32": lib.GGML_TYPE_F32}
        if kv_type not in types:
            raise UsageError(f"kv_type = {kv_type!r} must be one of: {', '.join(types)}")
        if batch < 1:
            raise UsageError(f"batch = {batch} must be at least 1")
        if not -1 <= gpu_layers < 2**31:
            raise UsageError(f"gpu_layers = {gpu_layers} must be a number of layers, or -1 for all")
        params = lib.llama_context_default_params()
        params.n_threads = params.n_threads_batch = choose_threads(threads)
        params.type_k = params.type_v = types[kv_type]
        flash = {None: "AUTO", True: "ENABLED", False: "DISABLED"}[flash_attention]
        params.flash_attn_type = getattr(lib, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
        params.offload_kqv = params.op_offload = gpu_layers != 0
        self._lib: Any = lib
        self._model = Model(path, gpu_layers)
        try:
            super().__init__(path, self._model.vocab_size, choose_context(context, self._model.trained_context))
            params.n_ctx = self.context
            params.n_batch = params.n_ubatch = self._batch = min(batch, self.context)
            self._pointer = self._model.make_context(params)
            if not self._pointer:
                raise SessionError(f"{path}: llama.cpp cannot create a context of {self.context}: {last_errors()}")
        except BaseException:
            self._model.close()
            raise
        self._memory = lib.llama_get_memory(self._pointer)
        self.codec = VocabCodec(self._model)  # the tokenizer in the file; usable until `close`

    def _forward(self, ids: NDArray[np.int32], last_only: bool) -> NDArray[np.float32]:
        return self._in_blocks(ids, last_only, self._batch, self._decode)

    def _decode(self, ids: NDArray[np.int32], _held: int, rows: NDArray[np.float32]) -> None:
        """Compute one batch; llama.cpp itself continues where the cache ends."""
        n, m = len(ids), len(rows)
        batch = self._lib.llama_batch(n_tokens=n, token=(ctypes.c_int32 * n)(*ids.tolist()))
        batch.logits = (ctypes.c_int8 * n)(*bytes(n - m), *b"\1" * m)
        status = call(self._lib.llama_decode, self._pointer, batch)
        raise_interruption()
        if status != 0:
            raise SessionError(f"{self._path}: llama_decode failed with status {status}: {last_errors()}")
        if m:  # llama.cpp's buffer holds these rows one after another
            ctypes.memmove(rows.ctypes.data, self._lib.llama_get_logits(self._pointer), rows.nbytes)

    def _truncate(self, length: int) -> None:
        if not self._lib.llama_memory_seq_rm(self._memory, SEQUENCE, length, -1):
            raise SessionError(f"{self._path}: llama.cpp cannot rewind this model's cache to {length}")

    def _release(self) -> None:
        self._model.close()

"""A sequence on mlx-lm: its models and its key/value caches.

Notation: n = tokens appended in one call, v = vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from numpy.typing import NDArray

from smolexport.errors import SessionClosedError, SessionError, UnsupportedError
from smolexport.run.session import TextCodec, choose_context, choose_threads, token_array
from smolexport.text import failure
from smolexport_on_mlx._load import config_size, load_model

# Tokens computed at once: the CPU keeps a whole matrix of attention weights, and Ctrl-C waits for a block's end.
BLOCK = 512


class MlxSession:
    """One sequence.  Arguments as for `smolexport_on_mlx.open`."""

    def __init__(self, folder: Path, *, threads: int | None, context: int | None, dtype: str | None) -> None:
        choose_threads(threads)  # refuses what no runtime takes; MLX has nothing to set
        self._folder = folder
        self._model, config = load_model(folder, dtype)
        self._cache: list[Any] | None = self._new_cache()
        self._vocab_size = config_size(folder, config, "vocab_size")
        self._context = choose_context(context, config_size(folder, config, "max_position_embeddings"))
        self._codec: TextCodec | None = None
        self._length = 0

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

        In f16 and bf16 the model computes its logits so; they come back widened, not recomputed.

        Raises:
            SessionClosedError: after `close`.
            SessionError: no tokens, an id outside the vocabulary, or MLX failed; nothing is appended then.
            ContextOverflowError: before anything is computed.
        """
        self._check_open()
        ids = token_array(tokens, held=self._length, context=self._context, vocab_size=self._vocab_size)
        if mx.default_device().type == mx.cpu:
            # For a whole process, so set before each use.  Compiled, MLX would call g++ for a few fused steps and
            # load what it finds under a guessable name in the folder for temporary files; the results are the same.
            mx.disable_compile()
        try:
            logits = self._forward(ids, last_only)
        except Exception as error:  # MLX reports a lack of memory as RuntimeError
            self._cut(self._length)
            raise SessionError(f"{self._folder}: MLX failed: {failure(error)}") from error
        except BaseException:
            self._cut(self._length)
            raise
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
        self._cut(length)
        self._length = length

    def close(self) -> None:
        """Free the model; a second call does nothing."""
        if self._model is not None:
            self._model = self._cache = None
            mx.clear_cache()  # MLX keeps freed memory for itself otherwise

    def __enter__(self) -> MlxSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _forward(self, ids: NDArray[np.int32], last_only: bool) -> NDArray[np.float32]:
        if last_only:
            for block in _blocks(ids[:-1]):
                self._compute(block, head=False)
            ids = ids[-1:]
        logits = np.empty((len(ids), self._vocab_size), np.float32)
        for block, rows in zip(_blocks(ids), _blocks(logits), strict=True):
            output = self._compute(block, head=True)[0].astype(mx.float32)
            if output.shape != rows.shape:  # broadcasting would hide it
                raise ValueError(f"logits of shape {output.shape} instead of {rows.shape}")
            rows[:] = np.array(output)
        return logits

    def _compute(self, block: NDArray[np.int32], *, head: bool) -> mx.array:
        """Logits [1, n, v] after `block`, left uncomputed without `head`.

        The cache is computed in any case: nothing pending outlives a call, which may have been the thread's last.
        """
        logits: mx.array = self._model(mx.array(block)[None], cache=self._cache)
        mx.eval([layer.state for layer in self._cache or ()], [logits] if head else [])
        return logits

    def _cut(self, length: int) -> None:
        """Shorten each layer's cache by itself: an interrupted forward leaves some longer than others."""
        if length == 0:
            self._cache = self._new_cache()
            return
        for layer in self._cache or ():
            layer.trim(layer.offset - length)

    def _new_cache(self) -> list[Any]:
        """One empty cache a layer, each of which can be rewound.

        Raises:
            UnsupportedError: the model keeps a state that cannot.
        """
        caches = [
            WindowCache(layer.max_size) if isinstance(layer, RotatingKVCache) and layer.keep == 0 else layer
            for layer in make_prompt_cache(self._model)
        ]
        for layer in caches:
            if not isinstance(layer, KVCache):
                raise UnsupportedError(
                    f"{self._folder}: a {type(layer).__name__} cannot be rewound, which a session needs"
                )
        return caches

    def _check_open(self) -> None:
        if self._model is None:
            raise SessionClosedError(f"{self._folder}: the session is closed; open it again")


class WindowCache(KVCache):  # type: ignore[misc]
    """Keys and values of a layer with a sliding window, all of them: the rotating cache forgets what a rewind needs."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self._window = window

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Mask of the last `count` tokens, as the rotating cache makes it."""
        return super().make_mask(count, return_array=return_array, window_size=window_size or self._window)


def _blocks(rows: NDArray[Any]) -> list[NDArray[Any]]:
    """Views of at most BLOCK rows."""
    return [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]

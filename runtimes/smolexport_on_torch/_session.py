"""A sequence on transformers: forward with a growing cache.

Notation: n = tokens appended in one call, v = vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from smolexport.errors import SessionClosedError, SessionError
from smolexport.run.session import TextCodec, choose_context, choose_threads, token_array
from smolexport_on_torch._load import load_model


class TorchSession:
    """One sequence.  Arguments as for `smolexport_on_torch.open`."""

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None,
        context: int | None,
        dtype: str,
        weights: Iterable[tuple[str, NDArray[Any]]] | None,
    ) -> None:
        self._folder = folder
        self._threads = choose_threads(threads)
        self._model: Any = load_model(folder, dtype, weights)
        config = self._model.config.get_text_config()
        self._vocab_size = int(config.vocab_size)
        self._context = choose_context(context, int(config.max_position_embeddings))
        self._cache: Any = DynamicCache()
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
        """The checkpoint's own tokenizer, read from tokenizer.json when first asked for.

        Raises:
            TokenizerError: the folder has none, or one that is not understood.
        """
        from smolexport.tokenizer import open_tokenizer, read_tokenizer

        if self._codec is None:
            self._codec = open_tokenizer(self._folder, read_tokenizer(self._folder, self._vocab_size))
        return self._codec

    def append(self, tokens: Sequence[int] | NDArray[np.integer], *, last_only: bool = False) -> NDArray[np.float32]:
        """Feed `tokens`, return the logits [n, v] after each, or only the last row [1, v].

        In bf16 the model computes its logits in bf16; they come back widened, not recomputed.

        Raises:
            SessionClosedError: after `close`.
            SessionError: no tokens, or an id outside the vocabulary.
            ContextOverflowError: before anything is computed.
        """
        self._check_open()
        ids = token_array(tokens, held=self._length, context=self._context, vocab_size=self._vocab_size)
        if torch.get_num_threads() != self._threads:  # torch has one setting per process
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                output = self._model(
                    input_ids=torch.from_numpy(ids.astype(np.int64))[None],
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=1 if last_only else 0,
                )
                logits: NDArray[np.float32] = output.logits[0].float().numpy()
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
        self._model = None
        self._cache = None

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _cut(self, length: int) -> None:
        """Shorten each layer's cache by itself: an interrupted forward leaves some longer than others."""
        if length == 0:
            self._cache = DynamicCache()
            return
        for layer in self._cache.layers:
            held = layer.get_seq_length()
            if held > length:
                layer.crop(length - held)  # negative: how many to drop

    def _check_open(self) -> None:
        if self._model is None:
            raise SessionClosedError(f"{self._folder}: the session is closed; open it again")

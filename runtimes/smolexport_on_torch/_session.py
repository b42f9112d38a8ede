"""A sequence on transformers: forward with a growing cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from smolexport.run.session import Session, choose_context, choose_threads
from smolexport_on_torch._load import load_model, use_threads


class TorchSession(Session):
    """One sequence.  Arguments as for `smolexport_on_torch.open`."""

    LIBRARY = "transformers"

    def __init__(
        self,
        folder: Path,
        threads: int | None,
        context: int | None,
        dtype: str,
        weights: Iterable[tuple[str, NDArray[Any]]] | None,
    ) -> None:
        self._threads = choose_threads(threads)
        self._model: Any = load_model(folder, dtype, weights)
        self._cache: Any = DynamicCache()
        config = self._model.config.get_text_config()
        super().__init__(folder, int(config.vocab_size), choose_context(context, int(config.max_position_embeddings)))

    def _forward(self, ids: NDArray[np.int32], last_only: bool) -> NDArray[np.float32]:
        use_threads(self._threads)
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.from_numpy(ids.astype(np.int64))[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1 if last_only else 0,
            )
            logits: NDArray[np.float32] = output.logits[0].float().numpy()
        return logits

    def _truncate(self, length: int) -> None:
        if length == 0:
            self._cache = DynamicCache()
            return
        for layer in self._cache.layers:  # each by itself: an interrupted forward leaves some longer than others
            held = layer.get_seq_length()
            if held > length:
                layer.crop(length - held)  # negative: how many to drop

    def _release(self) -> None:
        self._model = self._cache = None

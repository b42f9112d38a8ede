"""A folder's tokenizer and chat template, as mlx-lm has them: transformers' within a wrapper with its own defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lm import tokenizer_utils

from smolexport.errors import TokenizerError
from smolexport.text import failure


class MlxChat:
    """mlx-lm's `TokenizerWrapper`.  Arguments as for `smolexport_on_mlx.open_chat`."""

    def __init__(self, folder: Path) -> None:
        local = {"trust_remote_code": False, "local_files_only": True}
        try:
            self._tokenizer: Any = tokenizer_utils.load(folder, local)
        except Exception as error:  # mlx-lm raises whatever its parts raise
            raise TokenizerError(f"{folder}: mlx-lm cannot read this tokenizer: {failure(error)}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it recognised, none added."""
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]

    def prompt(self, text: str) -> list[int]:
        """Ids of `text` as `mlx_lm.generate` has them, unless it opens with BOS itself."""
        return [int(i) for i in self._tokenizer.encode(text)]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        switches: Mapping[str, Any],
    ) -> str:
        """The prompt; raises whatever the template does."""
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False, **switches
            )
        )

"""A folder's tokenizer and chat template, as transformers has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from smolexport.errors import TokenizerError
from smolexport.model.source_files import refuse_links
from smolexport.text import first_line


class TransformersChat:
    """`apply_chat_template` in transformers' sandbox.  Arguments as for `smolexport_on_torch.open_chat`."""

    def __init__(self, folder: Path) -> None:
        refuse_links(folder)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its parts raise
            raise TokenizerError(
                f"{folder}: transformers cannot read this tokenizer: {type(error).__name__}: {first_line(error)}"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it recognised, none added."""
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def prompt(self, text: str) -> list[int]:
        """Ids of `text` as a text-generation pipeline has them."""
        return [int(i) for i in self._tokenizer(text)["input_ids"]]

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

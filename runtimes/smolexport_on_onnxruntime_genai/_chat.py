"""A folder's tokenizer and chat template, as ONNX Runtime GenAI has them: all its own, in C++."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime_genai as og

from smolexport.errors import TokenizerError, UnsupportedError
from smolexport.text import reason


class GenaiChat:
    """The library's `Tokenizer`.  Arguments as for `smolexport_on_onnxruntime_genai.open_chat`."""

    def __init__(self, folder: Path) -> None:
        try:
            self._usual: Any = og.Tokenizer(str(folder))
            self._tokenizer: Any = og.Tokenizer(str(folder))
            self._tokenizer.update_options(add_special_tokens="false")
        except Exception as error:  # whatever the library's binding raises
            raise TokenizerError(f"{folder}: ONNX Runtime GenAI cannot read this tokenizer: {reason(error)}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it recognised, none added."""
        return [int(i) for i in self._tokenizer.encode(text)]

    def prompt(self, text: str) -> list[int]:
        """Ids of `text` as the library's `Tokenizer` has them without options."""
        return [int(i) for i in self._usual.encode(text)]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        switches: Mapping[str, Any],
    ) -> str:
        """The prompt; raises whatever the template does.

        Raises:
            UnsupportedError: switches, which this library has no way to pass on.
        """
        if switches:
            raise UnsupportedError(f"no way to set {', '.join(switches)} of a template in ONNX Runtime GenAI")
        more = {} if tools is None else {"tools": json.dumps(tools, ensure_ascii=False)}
        return str(
            self._tokenizer.apply_chat_template(
                json.dumps(messages, ensure_ascii=False), add_generation_prompt=add_generation_prompt, **more
            )
        )

"""A folder's tokenizer and chat template, as ONNX Runtime GenAI has them: all its own, in C++."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as og

from smolexport.errors import UnsupportedError
from smolexport.run.chat import Messages, reading_tokenizer


class GenaiChat:
    """The library's `Tokenizer`.  Arguments as for `smolexport_on_onnxruntime_genai.open_chat`."""

    def __init__(self, folder: Path) -> None:
        with reading_tokenizer(folder, "ONNX Runtime GenAI"):
            self._framing: Any = og.Tokenizer(str(folder))
            self._plain: Any = og.Tokenizer(str(folder))
            self._plain.update_options(add_special_tokens="false")

    def encode(self, text: str, *, framed: bool = False) -> list[int]:
        return [int(i) for i in (self._framing if framed else self._plain).encode(text)]

    def render(self, messages: Messages, tools: Messages | None, add_generation_prompt: bool, **switches: Any) -> str:
        if switches:
            raise UnsupportedError(f"ONNX Runtime GenAI cannot set {', '.join(switches)} of a template")
        more = {} if tools is None else {"tools": json.dumps(tools, ensure_ascii=False)}
        return str(
            self._plain.apply_chat_template(
                json.dumps(messages, ensure_ascii=False), add_generation_prompt=add_generation_prompt, **more
            )
        )

"""A GGUF file's tokenizer in llama.cpp, and its chat template as llama-cpp-python renders it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smolexport.errors import TokenizerError
from smolexport.run.chat import Messages
from smolexport_on_llamacpp._codec import VocabCodec
from smolexport_on_llamacpp._library import Model


class LlamaChat:
    """The vocabulary alone, without weights.  Arguments as for `smolexport_on_llamacpp.open_chat`."""

    def __init__(self, path: Path) -> None:
        self._model = Model(path, 0, vocab_only=True)
        self._codec = VocabCodec(self._model)
        self._template = self._model.text("tokenizer.chat_template")

    def encode(self, text: str, *, framed: bool = False) -> list[int]:
        return self._codec.tokenize(text, add_special=framed)

    def render(self, messages: Messages, tools: Messages | None, add_generation_prompt: bool, **switches: Any) -> str:
        """The prompt, from the bindings' formatter as their chat completion builds it."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        if self._template is None:
            raise TokenizerError(f"{self._model.path}: holds no tokenizer.chat_template")
        lib, vocab = self._model.lib, self._model.vocab
        bos, eos = (self._token(end(vocab)) for end in (lib.llama_vocab_bos, lib.llama_vocab_eos))
        formatter: Any = Jinja2ChatFormatter(
            self._template, eos_token=eos, bos_token=bos, add_generation_prompt=add_generation_prompt
        )
        return str(formatter(messages=messages, tools=tools, **switches).prompt)

    def _token(self, token: int) -> str:
        """The text of a token, empty where the file has no such token."""
        return "" if token < 0 else self._model.lib.llama_vocab_get_text(self._model.vocab, token).decode("utf-8")

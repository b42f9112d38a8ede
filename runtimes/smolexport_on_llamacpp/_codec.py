"""llama.cpp's tokenizer over the vocabulary in the file."""

from __future__ import annotations

import codecs
import ctypes
from functools import cached_property

import numpy as np

from smolexport.errors import SessionError, UsageError
from smolexport_on_llamacpp._library import Model


class VocabCodec:
    """Text to tokens and back, as llama.cpp does it for this file."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._ends: frozenset[int] | None = None

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Every token that llama.cpp takes for the end of a generation."""
        self._model.check_open()
        if self._ends is None:
            ends, vocab = self._model.lib.llama_vocab_is_eog, self._model.vocab
            self._ends = frozenset(t for t in range(self._model.vocab_size) if ends(vocab, t))
        return self._ends

    @cached_property
    def _opening(self) -> list[int]:
        lib, vocab = self._model.lib, self._model.vocab
        return [int(lib.llama_vocab_bos(vocab))] if lib.llama_vocab_get_add_bos(vocab) else []

    def encode(self, text: str) -> list[int]:
        """Ids of `text` with special tokens recognised; BOS is added where the file asks for it, EOS never."""
        ids = self.tokenize(text, add_special=False)
        return [*self._opening, *ids]

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """Ids of `text` with special tokens recognised; `add_special`: BOS and EOS are added as the file asks.

        Raises:
            UsageError: text that is not Unicode (lone surrogates).
            SessionClosedError: the session was closed.
        """
        self._model.check_open()
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text cannot be encoded as UTF-8: {error}") from error
        lib, room = self._model.lib, len(data) + 8
        while True:
            ids = np.empty(room, np.int32)
            pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            count = lib.llama_tokenize(self._model.vocab, data, len(data), pointer, room, add_special, True)
            if count >= 0:
                return [int(i) for i in ids[:count]]
            if -count <= room:
                raise SessionError(f"{self._model.path}: llama.cpp cannot tokenize a text of {len(data)} bytes")
            room = -count

    def decoder(self) -> PieceDecoder:
        return PieceDecoder(self._model)


class PieceDecoder:
    """Joins the bytes of tokens and returns complete characters."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that `token` completes; control tokens have none."""
        self._model.check_open()
        if not 0 <= token < self._model.vocab_size:
            raise SessionError(f"decode: token {token} is outside the vocabulary of {self._model.vocab_size}")
        return self._utf8.decode(self._piece(token))

    def flush(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

    def _piece(self, token: int) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            lib, vocab = self._model.lib, self._model.vocab
            count = lib.llama_token_to_piece(vocab, token, buffer, room, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

"""The checkpoint's own tokenizer as a TextCodec.

The tokenizers library encodes, from tokenizer.json itself and the tokens of other files: transformers' AutoTokenizer
rebuilds some tokenizers by class and loses parts of their pre-tokenizer.  Decoding is done here, from the bytes of each
token, so that text can be streamed.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smolexport.errors import TokenizerError, UsageError
from smolexport.model.source_files import file_in
from smolexport.text import show
from smolexport.tokenizer.reader import load_library
from smolexport.tokenizer.spec import SpacePrefix, TokenizerKind, TokenizerSpec, TokenKind

HIDDEN = {TokenKind.CONTROL, TokenKind.UNKNOWN}


def byte_characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2): the printable ones of Latin-1 for
    themselves, the rest from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = byte_characters()


def piece_bytes(spec: TokenizerSpec, token: int) -> bytes:
    """The bytes of `token`; special tokens as written, none for unused ones."""
    text, kind = spec.tokens[token], spec.kinds[token]
    if kind is TokenKind.UNUSED:
        return b""
    if kind is TokenKind.BYTE:
        return bytes.fromhex(text[3:5])
    if kind is TokenKind.NORMAL and spec.kind is TokenizerKind.CHARACTERS:
        return text.replace("▁", " ").encode()
    if kind is TokenKind.NORMAL and all(character in BYTE_OF for character in text):
        return bytes(BYTE_OF[character] for character in text)
    return text.encode()


class PieceDecoder:
    """A TextDecoder.  `special`: also show control tokens.  `opens`: drop the space that encoding added in front."""

    def __init__(self, spec: TokenizerSpec, *, special: bool, opens: bool) -> None:
        self._spec = spec
        self._special = special
        self._drop_space = opens and spec.space_prefix is not SpacePrefix.NEVER
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that `token` completes; may be empty.  Raises TokenizerError for an id outside the vocabulary."""
        if not 0 <= token < len(self._spec.tokens):
            raise TokenizerError(f"token {show(token)} is outside the vocabulary of {len(self._spec.tokens)}")
        if self._spec.kinds[token] in HIDDEN and not self._special:
            return ""
        return self._trim(self._utf8.decode(piece_bytes(self._spec, token)))

    def flush(self) -> str:
        """The text still held back, with U+FFFD for bytes that are not UTF-8."""
        return self._trim(self._utf8.decode(b"", final=True))

    def _trim(self, text: str) -> str:
        if not self._drop_space or not text:
            return text
        self._drop_space = False
        return text.removeprefix(" ")


class FileTokenizer:
    """The tokenizer of a checkpoint's folder.

    Attributes:
        spec: what the tokenizer is.
        stop_tokens: tokens that end a generation.
    """

    def __init__(self, spec: TokenizerSpec, library: Any) -> None:
        self.spec = spec
        self.stop_tokens = spec.stop_tokens
        self._library = library

    def encode(self, text: str, *, frame: bool = True) -> list[int]:
        """Ids of `text`; special tokens in it are recognised.

        `frame`: put BOS in front if the tokenizer does.  EOS is never added: a prompt is continued.
        Raises UsageError for a text that is not valid Unicode.
        """
        try:
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # the library does not take half a surrogate pair for text
            raise UsageError(f"the text {show(text)} holds half a surrogate pair; remove it") from None
        if frame and self.spec.add_bos and self.spec.bos is not None:
            return [self.spec.bos, *ids]
        return ids

    def decoder(self, *, special: bool = False, opens: bool = False) -> PieceDecoder:
        """A new incremental decoder.

        `special`: show control tokens as written.  `opens`: the tokens begin a text rather than continue one, so the
        space that encoding added in front is dropped.
        """
        return PieceDecoder(self.spec, special=special, opens=opens)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of a whole sequence."""
        decoder = self.decoder(special=special, opens=True)
        return "".join([*map(decoder.push, ids), decoder.flush()])


def open_tokenizer(folder: Path, spec: TokenizerSpec) -> FileTokenizer:
    """The codec of the checkpoint in `folder` with the tokenizer `spec`.  Raises TokenizerError."""
    path = file_in(folder, "tokenizer.json")
    if path is None:
        raise TokenizerError(f"{folder / 'tokenizer.json'}: the file does not exist")
    return FileTokenizer(spec, load_library(path, spec.beside))

"""A checkpoint's tokenizer as plain data, and as a codec; from its own files, without transformers.

| file | what it holds |
|---|---|
| `spec.py` | `TokenizerSpec` and its enums: what every converter may know |
| `files.py` | bounded, checked reading of the JSON and Jinja files |
| `structure.py` | normalizer and pre-tokenizer, recognised by what they do |
| `vocabulary.py` | tokens, kinds, merges |
| `added_tokens.py` | added tokens of all files, merged as transformers does; files for a converted folder |
| `reader.py` | `read_tokenizer`: special tokens, chat templates, and all of the above |
| `codec.py` | `FileTokenizer`, the `TextCodec` of a checkpoint |
"""

from __future__ import annotations

from smolexport.tokenizer.codec import FileTokenizer, open_tokenizer
from smolexport.tokenizer.reader import read_tokenizer
from smolexport.tokenizer.spec import (
    AddedToken,
    Normalizer,
    PreTokenizer,
    SpacePrefix,
    TokenizerKind,
    TokenizerSpec,
    TokenKind,
)

__all__ = [
    "AddedToken",
    "FileTokenizer",
    "Normalizer",
    "PreTokenizer",
    "SpacePrefix",
    "TokenKind",
    "TokenizerKind",
    "TokenizerSpec",
    "open_tokenizer",
    "read_tokenizer",
]

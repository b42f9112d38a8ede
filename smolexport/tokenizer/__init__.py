"""A checkpoint's tokenizer as plain data, and as a codec; from its own files, without transformers.

| file | what it holds |
|---|---|
| `spec.py` | `TokenizerSpec` and its enums: what every converter may know |
| `files.py` | bounded, checked reading of the JSON and Jinja files |
| `structure.py` | normalizer and pre-tokenizer, recognised by what they are |
| `merging.py` | added tokens that other files have, as transformers merges them |
| `vocabulary.py` | tokens, kinds, merges, added tokens |
| `special.py` | bos/eos/eot/pad/unk, stop tokens, chat templates |
| `overlaps.py` | texts in which several added tokens want the same characters |
| `derive.py` | which tokens the merges build, and in what order |
| `reader.py` | `read_tokenizer`, all of the above put together |
| `written.py` | the files for a folder that is written, where they cannot be copied |
| `codec.py` | `FileTokenizer`, the `TextCodec` of a checkpoint |
"""

from __future__ import annotations

from smolexport.tokenizer.codec import FileTokenizer, open_tokenizer
from smolexport.tokenizer.derive import unbuilt_tokens
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
    "unbuilt_tokens",
]

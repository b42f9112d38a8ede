"""What the readers of an ONNX folder find otherwise than its tokenizer.json says, one line each.

Facts, tried out: Transformers.js 4.3, ONNX Runtime GenAI 0.18.  Plain ONNX Runtime brings no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unicodedata import normalize

from smolexport.text import show
from smolexport.tokenizer import Normalizer, TokenizerSpec
from smolexport.tokenizer.merging import few
from smolexport.tokenizer.overlaps import differing, leftmost

__all__ = ["token_notes"]

JS, GENAI = "Transformers.js", "ONNX Runtime GenAI"


def token_notes(spec: TokenizerSpec, config: Mapping[str, Any]) -> Iterator[str]:
    """All differences; `config` is the tokenizer_config.json that is written."""
    yield from _prompts(spec, config)
    if spec.normalizer is Normalizer.NFC:
        yield f"the tokenizer composes Unicode (NFC) and {GENAI} does not: text with decomposed accents differs there"
        kept = [token.text for token in spec.added if token.normalized and normalize("NFC", token.text) != token.text]
        if kept:
            yield f"{_few(kept)}: the tokenizer finds the composed form too, {GENAI} only this one"
        raw = [token.text for token in spec.added if not token.normalized]
        if more := [text for text in raw if normalize("NFD", text) != text]:
            yield f"{_few(more)}: {JS} finds the decomposed form too, the tokenizer only this one"
    if nul := [token.text for token in spec.added if "\0" in token.text]:
        yield f"{GENAI} reads a text up to NUL: it never finds {_few(nul)}"
    if before := [token.text for token in spec.added if token.lstrip]:
        yield f"the space before {_few(before)} stays a token of its own in {GENAI}, which knows no lstrip"
    if words := [token.text for token in spec.added if token.single_word]:
        yield f"{JS} and {GENAI} find {_few(words)} within words too: they know no single_word"
    if len({token.normalized for token in spec.added}) > 1:
        for text, theirs, ours in differing(spec, leftmost):
            yield f"in {show(text)} {JS} and {GENAI} find {_few(theirs)}, the tokenizer {_few(ours)}"


def _prompts(spec: TokenizerSpec, config: Mapping[str, Any]) -> Iterator[str]:
    """What stands around a prompt where tokenizer.json puts something around a text."""
    before, behind = (spec.bos if spec.add_bos else None), (spec.eos if spec.add_eos else None)
    places = ((before, "before"), (behind, "behind"))
    words = " and ".join(f"{show(spec.tokens[index])} {where}" for index, where in places if index is not None)
    if words:
        asked = config.get("add_bos_token") or config.get("add_eos_token")
        yield (
            f"tokenizer.json puts {words} a text: {JS}'s tokenizer does so, its text-generation pipeline "
            f"{'too' if asked else 'does not'}, {GENAI} only with add_special_tokens"
        )


def _few(texts: Sequence[str]) -> str:
    return few([show(text) for text in texts])

"""A tokenizer as GGUF metadata, and what llama.cpp cannot do with it.

llama.cpp has its own tokenizers, chosen by `tokenizer.ggml.model` and, for byte-level BPE, by a name for the cutting
pattern (`tokenizer.ggml.pre`).  `check_vocabulary` refuses what would give other tokens on ordinary text;
`vocabulary_notes` names the rarer differences.  Facts: llama.cpp's src/llama-vocab.cpp and src/unicode.cpp.

Notation: v = vocab_size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from smolexport.text import printable, show
from smolexport.tokenizer import (
    Normalizer,
    PreTokenizer,
    SpacePrefix,
    TokenizerKind,
    TokenizerSpec,
    TokenKind,
    unbuilt_tokens,
)
from smolexport.tokenizer.codec import byte_characters

__all__ = ["Entry", "check_vocabulary", "vocabulary_metadata", "vocabulary_notes"]

TYPE_CODES = {
    TokenKind.NORMAL: 1,
    TokenKind.UNKNOWN: 2,
    TokenKind.CONTROL: 3,
    TokenKind.USER: 4,
    TokenKind.UNUSED: 5,
    TokenKind.BYTE: 6,
}
CUTTERS = {
    PreTokenizer.GPT2: "gpt-2",
    PreTokenizer.DIGITS_GPT2: "smollm",
    PreTokenizer.LLAMA3: "llama-bpe",
    PreTokenizer.QWEN2: "qwen2",
    PreTokenizer.QWEN35: "qwen35",
}
TAKES_WHOLE_WORDS = "llama-bpe"  # the one cutter above that takes a piece whole when it is a token
LLAMA3_BY_MERGES = "smaug-bpe"  # the same pattern, always merging
# Texts at which llama.cpp ends a generation wherever a vocabulary has them, the fill-in-the-middle ones included.
ALWAYS_ENDS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <|file_sep|>
    <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>
    <\uff5cend▁of▁sentence\uff5c>""".split()
)
# Texts that its loader makes control tokens besides.
ALWAYS_CONTROL = ALWAYS_ENDS | frozenset(
    """<|fim_prefix|> <fim-prefix> <fim_prefix> <PRE> <|code_prefix|> <|prefix|> <|fim_suffix|> <fim-suffix>
    <fim_suffix> <SUF> <|code_suffix|> <|suffix|> <|fim_middle|> <fim-middle> <fim_middle> <MID> <|code_middle|>
    <|middle|>""".split()
)
BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
MOST_OVERLAPS = 200  # pairs looked at; real tokenizers have none
IN_UTF8 = frozenset(byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5)


class Entry(NamedTuple):
    """One key of the metadata.  `kind`: string, u32, i32, f32, bool, or one of these in brackets for an array."""

    key: str
    kind: str
    value: str | int | float | bool | Sequence[str] | Sequence[int] | Sequence[float]


def vocabulary_metadata(spec: TokenizerSpec) -> list[Entry]:
    """The tokenizer's keys in file order.  `check_vocabulary` must have had no objections."""
    return [Entry(f"tokenizer.{key}", kind, value) for key, kind, value in _entries(spec)]


def _entries(spec: TokenizerSpec) -> Iterator[Entry]:
    byte_level = spec.kind is TokenizerKind.BYTES
    yield Entry("ggml.model", "string", "gpt2" if byte_level else "llama")
    yield Entry("ggml.pre", "string", _cutter(spec) if byte_level else "default")
    yield Entry("ggml.tokens", "[string]", spec.tokens)
    if not byte_level:
        yield Entry("ggml.scores", "[f32]", spec.scores)
    yield Entry("ggml.token_type", "[i32]", [_type_code(spec, index) for index in range(len(spec.tokens))])
    if byte_level:
        # The loader splits at the first space.  A part with a space in it could never match: byte-level text has none.
        pairs = [f"{left} {right}" for left, right in spec.merges if " " not in left and " " not in right]
        yield Entry("ggml.merges", "[string]", pairs)
    yield from _special_entries(spec)
    # Always written: what the loader assumes when they are missing depends on `pre`.
    yield Entry("ggml.add_bos_token", "bool", spec.add_bos)
    yield Entry("ggml.add_eos_token", "bool", spec.add_eos)
    yield Entry("ggml.add_space_prefix", "bool", spec.add_space_prefix)
    if spec.chat_template is not None:
        yield Entry("chat_template", "string", spec.chat_template)
    if spec.chat_templates:
        # Names become parts of keys, for which llama.cpp's converters allow letters and digits only.
        named = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in spec.chat_templates.items()}
        yield Entry("chat_templates", "[string]", sorted(named))
        for name in sorted(named):
            yield Entry(f"chat_template.{name}", "string", named[name])


def _special_entries(spec: TokenizerSpec) -> Iterator[Entry]:
    # Without a bos key the loader would take id 11 or 1, whatever that is; the end of the last text is a fair start.
    bos = spec.eos if spec.bos is None else spec.bos
    eot = None if spec.eot == spec.eos else spec.eot
    named = {"bos": bos, "eos": spec.eos, "eot": eot, "unknown": spec.unk, "padding": spec.pad}
    for name, index in named.items():
        if index is not None:
            yield Entry(f"ggml.{name}_token_id", "u32", index)


def _type_code(spec: TokenizerSpec, index: int) -> int:
    """llama.cpp's converters count every `<|…|>` as a control token, and its loader does so for many of them."""
    text, kind = spec.tokens[index], spec.kinds[index]
    if kind is TokenKind.USER and text.startswith("<|") and text.endswith("|>"):
        kind = TokenKind.CONTROL
    return TYPE_CODES[kind]


def _cutter(spec: TokenizerSpec) -> str:
    """The `pre` name whose pattern and treatment of whole words are those of `spec`."""
    name = CUTTERS[spec.pre_tokenizer]
    if name == TAKES_WHOLE_WORDS and not spec.ignore_merges and unbuilt_tokens(spec):
        return LLAMA3_BY_MERGES
    return name


def check_vocabulary(spec: TokenizerSpec) -> list[str]:
    """Reasons why llama.cpp cannot reproduce the tokenizer, one line each; empty if it can."""
    reasons: list[str] = []
    if spec.eos is None:
        reasons.append("the tokenizer names no eos token, and llama.cpp would take id 11 or 2 for it; set eos_token")
    trimming = [token.text for token in spec.added if token.trims]
    if trimming:
        reasons.append(f"{_few(trimming)}: llama.cpp knows no lstrip, rstrip or single_word for added tokens")
    if spec.kind is TokenizerKind.BYTES:
        reasons += _check_bytes(spec)
    else:
        reasons += _check_characters(spec)
    return reasons


def _check_bytes(spec: TokenizerSpec) -> list[str]:
    name = CUTTERS.get(spec.pre_tokenizer)
    if name is None:
        return [f"llama.cpp has no byte-level pre-tokenizer for {spec.pre_tokenizer.value}"]
    if spec.ignore_merges and name != TAKES_WHOLE_WORDS and (lost := unbuilt_tokens(spec)):
        tokens = _few([spec.tokens[index] for index in lost])
        return [
            f"ignore_merges is true, but llama.cpp merges after {spec.pre_tokenizer.value}: it never builds {tokens}"
        ]
    return []


def _check_characters(spec: TokenizerSpec) -> list[str]:
    reasons: list[str] = []
    held = {text for text, kind in zip(spec.tokens, spec.kinds, strict=True) if kind is TokenKind.BYTE}
    if absent := sorted(BYTE_TOKENS - held):
        reasons.append(f"{_few(absent)} missing: llama.cpp stops at a character that it cannot spell in byte tokens")
    if spec.unbuilt:
        tokens = _few([spec.tokens[index] for index in spec.unbuilt])
        reasons.append(f"the merges never build {tokens}, but llama.cpp joins any two neighbours that form a token")
    normal = [text for text, kind in zip(spec.tokens, spec.kinds, strict=True) if kind is TokenKind.NORMAL]
    crossing = [text for text in normal if "▁" in text[1:]]
    if spec.cuts_words and crossing:
        reasons.append(f"words are cut before each space, but llama.cpp does not cut: it would build {_few(crossing)}")
    return reasons


def vocabulary_notes(spec: TokenizerSpec) -> list[str]:
    """Where llama.cpp's tokens or stops differ from the checkpoint's on unusual text, one line each."""
    notes = list(spec.notes)
    if spec.normalizer is Normalizer.NFC:
        notes.append(
            "the tokenizer composes Unicode (NFC) and llama.cpp does not: text with decomposed accents differs"
        )
    if spec.kind is TokenizerKind.BYTES:
        spelled = set(spec.tokens)
        absent = [byte for text, byte in byte_characters().items() if byte in IN_UTF8 and text not in spelled]
        if absent:
            shown = _few([f"0x{byte:02X}" for byte in sorted(absent)])
            notes.append(f"no token for the bytes {shown}: both sides drop them, but merge around them differently")
    if spec.space_prefix in (SpacePrefix.FIRST, SpacePrefix.MISSING):
        where = "puts a space before each stretch between special tokens"
        notes.append(f"llama.cpp {where}, the tokenizer {spec.space_prefix.value}: such text differs by a space")
    normalized = [token.text for token in spec.added if token.normalized]
    if spec.kind is TokenizerKind.CHARACTERS and spec.space_prefix is SpacePrefix.ALWAYS and normalized:
        notes.append(f"{_few(normalized)}: found by the tokenizer only where a text begins, by llama.cpp everywhere")
    plain = [
        text
        for text, kind in zip(spec.tokens, spec.kinds, strict=True)
        if kind is TokenKind.NORMAL and text in ALWAYS_CONTROL
    ]
    if plain:
        notes.append(
            f"llama.cpp takes {_few(plain)} for a control token wherever text has it; here it is ordinary text"
        )
    return [*notes, *_overlap_notes(spec), *_stop_notes(spec)]


def _stop_notes(spec: TokenizerSpec) -> list[str]:
    ends = {i for i, text in enumerate(spec.tokens) if text in ALWAYS_ENDS} | {spec.eos, spec.eot}
    notes = []
    if more := sorted(index for index in ends if index is not None and index not in spec.stop_tokens):
        notes.append(f"llama.cpp also ends a generation at {_few([spec.tokens[index] for index in more])}")
    if less := sorted(spec.stop_tokens - {index for index in ends if index is not None}):
        notes.append(
            f"GGUF has no list of end tokens: llama.cpp goes on at {_few([spec.tokens[index] for index in less])}"
        )
    return notes


def _few(items: Sequence[str], limit: int = 5) -> str:
    shown = " ".join(printable(item, 40) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def _overlap_notes(spec: TokenizerSpec) -> list[str]:
    """Pairs of added tokens for which the leftmost match and the longest match of some text differ."""
    texts = [token.text for token in spec.added]
    notes = []
    for first, later, size in islice(_overlaps(texts), MOST_OVERLAPS):
        witness = first + later[size:]
        if _leftmost(witness, texts) != _longest(witness, texts):
            notes.append(
                f"in {show(witness)} llama.cpp finds the longer token {show(later)}, "
                f"the tokenizer the first {show(first)}"
            )
    return notes[:3]


def _overlaps(texts: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """(first, later, size): the last `size` characters of `first` open `later`, which is no shorter."""
    ends: dict[str, list[str]] = {}
    for text in texts:
        for at in range(1, len(text)):
            ends.setdefault(text[at:], []).append(text)
    for later in texts:
        for size in range(1, len(later)):
            yield from ((first, later, size) for first in ends.get(later[:size], ()) if len(first) <= len(later))


def _leftmost(text: str, tokens: Sequence[str]) -> list[str]:
    """Tokens found from left to right, the longest at each place."""
    found, at = [], 0
    while at < len(text):
        match = max((token for token in tokens if text.startswith(token, at)), key=len, default="")
        if match:
            found.append(match)
        at += len(match) or 1
    return found


def _longest(text: str, tokens: Sequence[str]) -> list[str]:
    """Tokens found by cutting the text at the longest token first."""
    parts: list[tuple[str, bool]] = [(text, False)]
    for token in sorted(tokens, key=len, reverse=True):
        cut: list[tuple[str, bool]] = []
        for part, done in parts:
            if done:
                cut.append((part, True))
                continue
            for number, piece in enumerate(part.split(token)):
                cut += [(token, True)] * (number > 0) + [(piece, False)]
        parts = cut
    return [part for part, done in parts if done]

"""A tokenizer as GGUF metadata, and what llama.cpp cannot do with it.

llama.cpp has its own tokenizers, chosen by `tokenizer.ggml.model` and, for byte-level BPE, by a name for the cutting
pattern (`tokenizer.ggml.pre`).  `check_vocabulary` refuses what would give other tokens on ordinary text, or could not
be loaded; `differences` has the rarer differences.  Facts: llama.cpp's src/llama-vocab.cpp and src/unicode.cpp.

Notation: v = vocab_size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

from smolexport.text import show
from smolexport.tokenizer import PreTokenizer, TokenizerKind, TokenizerSpec, TokenKind
from smolexport_to_gguf.differences import NOT_STRIPPED, NUL, RSTRIP_NAMES, few, is_control

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
BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class Entry(NamedTuple):
    """One key of the metadata.  `kind`: string, u32, i32, f32, bool, or one of these in brackets for an array."""

    key: str
    kind: str
    value: str | int | float | bool | Sequence[str] | Sequence[int] | Sequence[float]


class Merges(Sequence[str]):
    """Merges as the file has them, each written when it is asked for: there may be 280,000.

    The loader splits at the first space and ends at NUL.  A part with one could never match, and is left out:
    byte-level text has neither.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        odd = {part for pair in merges for part in pair if " " in part or NUL in part}
        self._merges = tuple(pair for pair in merges if odd.isdisjoint(pair)) if odd else merges

    def __len__(self) -> int:
        return len(self._merges)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        found = self._merges[index]
        return list(map(" ".join, found)) if isinstance(index, slice) else " ".join(found)  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def vocabulary_metadata(spec: TokenizerSpec) -> list[Entry]:
    """The tokenizer's keys in file order.  `check_vocabulary` must have had no objections."""
    return [Entry(f"tokenizer.{key}", kind, value) for key, kind, value in _entries(spec)]


def _entries(spec: TokenizerSpec) -> Iterator[Entry]:
    byte_level = spec.kind is TokenizerKind.BYTES
    yield Entry("ggml.model", "string", "gpt2" if byte_level else "llama")
    yield Entry("ggml.pre", "string", _cutter(spec) if byte_level else "default")
    yield Entry("ggml.tokens", "[string]", _texts(spec))
    if not byte_level:
        yield Entry("ggml.scores", "[f32]", spec.scores)
    yield Entry("ggml.token_type", "[i32]", [_type_code(spec, index) for index in range(len(spec.tokens))])
    if byte_level:
        yield Entry("ggml.merges", "[string]", Merges(spec.merges))
    yield from _special_entries(spec)
    # Always written: what the loader assumes when they are missing depends on `pre`.
    yield Entry("ggml.add_bos_token", "bool", spec.add_bos)
    # Never true: llama.cpp's tools would end every prompt, and its perplexity and imatrix abort.
    yield Entry("ggml.add_eos_token", "bool", False)
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


def _texts(spec: TokenizerSpec) -> Sequence[str]:
    """The tokens' texts; place holders for those that the loader would cut at NUL.

    What is left of them might be found in any text, and the loader gives up where two tokens have the same.
    """
    if not any(NUL in text for text in spec.tokens):
        return spec.tokens
    taken = set(spec.tokens)
    texts = []
    for index, text in enumerate(spec.tokens):
        held = text if NUL not in text else f"[NUL{index}]"
        while held is not text and held in taken:
            held += "_"
        texts.append(held)
    return texts


def _type_code(spec: TokenizerSpec, index: int) -> int:
    kind = TokenKind.CONTROL if is_control(spec, index) else spec.kinds[index]
    return TYPE_CODES[TokenKind.UNUSED if NUL in spec.tokens[index] else kind]


def _cutter(spec: TokenizerSpec) -> str:
    """The `pre` name whose pattern and treatment of whole words are those of `spec`."""
    name = CUTTERS[spec.pre_tokenizer]
    if name == TAKES_WHOLE_WORDS and not spec.ignore_merges and spec.unbuilt:
        return LLAMA3_BY_MERGES
    return name


def check_vocabulary(spec: TokenizerSpec, name: str = "") -> list[str]:
    """Reasons why llama.cpp cannot reproduce the tokenizer, one line each; empty if it can.

    Args:
        spec: the tokenizer.
        name: what the file calls the model.
    """
    reasons: list[str] = []
    if spec.eos is None:
        reasons.append("the tokenizer names no eos token, and llama.cpp would take id 11 or 2 for it; set eos_token")
    if any(part in name.lower() for part in RSTRIP_NAMES):
        lacking = sorted({*NOT_STRIPPED, "</s>"} - set(spec.tokens))
        if lacking:
            reasons.append(
                f"llama.cpp does not load a model that is called {show(name)} without the token "
                f"{few(lacking)}; give it another name with --name"
            )
    if spec.kind is TokenizerKind.BYTES:
        reasons += _check_bytes(spec)
    else:
        reasons += _check_characters(spec)
    return reasons


def _check_bytes(spec: TokenizerSpec) -> list[str]:
    name = CUTTERS.get(spec.pre_tokenizer)
    if name is None:
        return [f"llama.cpp has no byte-level pre-tokenizer for {spec.pre_tokenizer.value}"]
    if spec.ignore_merges and name != TAKES_WHOLE_WORDS and (lost := spec.unbuilt):
        tokens = few([spec.tokens[index] for index in lost])
        return [
            f"ignore_merges is true, but llama.cpp merges after {spec.pre_tokenizer.value}: it never builds {tokens}"
        ]
    return []


def _check_characters(spec: TokenizerSpec) -> list[str]:
    reasons: list[str] = []
    held = {text for text, kind in zip(spec.tokens, spec.kinds, strict=True) if kind is TokenKind.BYTE}
    if absent := sorted(BYTE_TOKENS - held):
        reasons.append(f"{few(absent)} missing: llama.cpp stops at a character that it cannot spell in byte tokens")
    if spec.unbuilt:
        tokens = few([spec.tokens[index] for index in spec.unbuilt])
        reasons.append(f"the merges never build {tokens}, but llama.cpp joins any two neighbours that form a token")
    normal = [text for text, kind in zip(spec.tokens, spec.kinds, strict=True) if kind is TokenKind.NORMAL]
    crossing = [text for text in normal if "▁" in text[1:]]
    if spec.cuts_words and crossing:
        reasons.append(f"words are cut before each space, but llama.cpp does not cut: it would build {few(crossing)}")
    return reasons

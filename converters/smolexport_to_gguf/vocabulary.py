"""A tokenizer as GGUF metadata, what llama.cpp cannot do with it, and what it does differently.

llama.cpp has its own tokenizers, chosen by `tokenizer.ggml.model` and, for byte-level BPE, by a name for the
pre-tokenizer's pattern (`tokenizer.ggml.pre`).  `check_vocabulary` refuses what would give other tokens on ordinary
text, or could not be loaded; `vocabulary_notes` lists the rarer differences.  Facts: llama.cpp's src/llama-vocab.cpp,
which treats many tokens by their text and some by the name of the model, and src/unicode.cpp.

Notation: v = vocab_size.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any
from unicodedata import normalize

from smolexport.text import printable, show
from smolexport.tokenizer import (
    Normalizer,
    PreTokenizer,
    SpacePrefix,
    TokenizerKind,
    TokenizerSpec,
    TokenKind,
)
from smolexport.tokenizer.added_tokens import differing
from smolexport.tokenizer.codec import BYTE_OF
from smolexport_to_gguf.container import LazyTexts

Key = tuple[str, str, Any]  # key, kind and value as `header_bytes` writes them
TYPE_CODES = {
    TokenKind.NORMAL: 1, TokenKind.UNKNOWN: 2, TokenKind.CONTROL: 3, TokenKind.USER: 4, TokenKind.UNUSED: 5,
    TokenKind.BYTE: 6,
}  # fmt: skip
CUTTERS = {
    PreTokenizer.GPT2: "gpt-2", PreTokenizer.DIGITS_GPT2: "smollm", PreTokenizer.LLAMA3: "llama-bpe",
    PreTokenizer.QWEN2: "qwen2", PreTokenizer.QWEN35: "qwen35",
}  # fmt: skip
TAKES_WHOLE_WORDS = "llama-bpe"  # the only one above that keeps a piece whole if it is a token
LLAMA3_BY_MERGES = "smaug-bpe"  # the same pattern, always merging
BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
NUL = "\0"
# Names of models for which llama.cpp drops the spaces after special tokens, and tokens that it then requires.
RSTRIP_NAMES, NOT_STRIPPED = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")
LSTRIP_NAME, LSTRIPPED = "modern-bert", "[MASK]"
# Texts at which it ends a generation, and which it makes control tokens.
ENDS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> [e~[
    <\uff5cend▁of▁sentence\uff5c>""".split()
)
# Of each group it treats one as the end of a generation, or as a control token.
END_GROUPS = (
    frozenset("<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]".split()),
    frozenset("<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>".split()),
    frozenset(["<|file_sep|>"]),
)
CONTROL_GROUPS = tuple(
    frozenset(f"<|fim_{a}|> <fim-{a}> <fim_{a}> <\uff5cfim▁{b}\uff5c> <{c}> ▁<{c}> <|code_{a}|> <|{a}|>".split())
    for a, b, c in (("prefix", "begin", "PRE"), ("suffix", "hole", "SUF"), ("middle", "end", "MID"))
)
PRINTED = frozenset("<|channel|> <|message|> <|start|> <|constrain|>".split())  # matched everywhere, and printed
# An end that, if certain others exist, is matched and printed instead, or ordinary text.
PRINTED_END, BESIDE_CALLS = "<|end|>", (frozenset(("<|call|>", "<|calls|>")), frozenset(("<|return|>", "<|flush|>")))
PLAIN_END, BESIDE_TOOLS = "</s>", "<|tool_response>"
IN_UTF8 = frozenset(byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5)


def vocabulary_metadata(spec: TokenizerSpec) -> list[Key]:
    """The tokenizer's keys in file order.  `check_vocabulary` must have had no objections."""
    return [(f"tokenizer.{key}", kind, value) for key, kind, value in _keys(spec)]


def _keys(spec: TokenizerSpec) -> Iterator[Key]:
    byte_level = spec.kind is TokenizerKind.BYTES
    yield "ggml.model", "string", "gpt2" if byte_level else "llama"
    yield "ggml.pre", "string", _cutter(spec) if byte_level else "default"
    yield "ggml.tokens", "[string]", _texts(spec)
    if not byte_level:
        yield "ggml.scores", "[f32]", spec.scores
    yield "ggml.token_type", "[i32]", [_type_code(spec, index) for index in range(len(spec.tokens))]
    if byte_level:
        yield "ggml.merges", "[string]", _merges(spec)
    # Without a bos key the loader would use id 11 or 1, whatever that is; the end of the last text is a fair start.
    bos = spec.eos if spec.bos is None else spec.bos
    eot = None if spec.eot == spec.eos else spec.eot
    named = {"bos": bos, "eos": spec.eos, "eot": eot, "unknown": spec.unk, "padding": spec.pad}
    yield from ((f"ggml.{name}_token_id", "u32", index) for name, index in named.items() if index is not None)
    # Always written: what the loader assumes when they are missing depends on `pre`.
    yield "ggml.add_bos_token", "bool", spec.add_bos
    # Never true: llama.cpp's tools would end every prompt, and its perplexity and imatrix abort.
    yield "ggml.add_eos_token", "bool", False
    yield "ggml.add_space_prefix", "bool", spec.add_space_prefix
    if spec.chat_template is not None:
        yield "chat_template", "string", spec.chat_template
    if spec.chat_templates:
        # Names become parts of keys, for which llama.cpp's converters allow letters and digits only.
        templates = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in spec.chat_templates.items()}
        yield "chat_templates", "[string]", sorted(templates)
        yield from ((f"chat_template.{name}", "string", text) for name, text in sorted(templates.items()))


def _merges(spec: TokenizerSpec) -> LazyTexts:
    """The loader splits at the first space and ends at NUL; byte-level text has neither, so such merges never match."""
    merges = spec.merges
    odd = {part for pair in merges for part in pair if " " in part or NUL in part}
    if odd:
        merges = tuple(pair for pair in merges if odd.isdisjoint(pair))
    return LazyTexts(len(merges), lambda index: " ".join(merges[index]))


def _texts(spec: TokenizerSpec) -> Sequence[str]:
    """The tokens' texts; placeholders for those that the loader would cut at NUL.

    What is left of them might match in any text, and the loader refuses two tokens with the same text.
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
    """Reasons why llama.cpp cannot reproduce the tokenizer; `name` is what the file calls the model."""
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


def is_control(spec: TokenizerSpec, index: int) -> bool:
    """Whether a token is written as a control token.

    llama.cpp's converters count every `<|…|>` as one, and its loader does so for many of them.
    """
    text, kind = spec.tokens[index], spec.kinds[index]
    return kind is TokenKind.CONTROL or (kind is TokenKind.USER and text.startswith("<|") and text.endswith("|>"))


def vocabulary_notes(spec: TokenizerSpec, name: str = "") -> list[str]:
    """All differences, one line each; `name` is what the file calls the model."""
    return [
        *spec.notes,
        *_held(spec),
        *_around(spec),
        *_stripped(spec, name.lower()),
        *_by_text(spec),
        *_overlaps(spec),
        *_stop_notes(spec),
    ]


def _held(spec: TokenizerSpec) -> Iterator[str]:
    """What the format or the tokenizer of llama.cpp cannot represent."""
    if spec.normalizer is Normalizer.NFC:
        yield "the tokenizer composes Unicode (NFC) and llama.cpp does not: text with decomposed accents differs"
        odd = [token.text for token in spec.added if token.normalized and normalize("NFC", token.text) != token.text]
        if odd:
            yield f"{few(odd)}: the tokenizer finds the composed form too, llama.cpp only this one"
    cut = [text for text in spec.tokens if NUL in text]
    if cut:
        yield f"llama.cpp reads a token's text up to NUL: it never finds {few(cut)}, and prints nothing for it"
    if NUL in (spec.chat_template or ""):
        yield "llama.cpp reads the chat template up to NUL"
    if spec.kind is not TokenizerKind.BYTES:
        return
    spelled = set(spec.tokens)
    absent = [byte for text, byte in BYTE_OF.items() if byte in IN_UTF8 and text not in spelled]
    if absent:
        shown = few([f"0x{byte:02X}" for byte in sorted(absent)])
        yield f"no token for the bytes {shown}: both sides drop them, but merge around them differently"
    foreign = [text for text in _of_kind(spec, TokenKind.NORMAL) if not BYTE_OF.keys() >= set(text) and NUL not in text]
    if foreign:
        yield f"llama.cpp prints [UNK_BYTE_…] for {few(foreign)}, whose characters are not those of bytes"


def _of_kind(spec: TokenizerSpec, sought: TokenKind) -> Iterator[str]:
    return (text for text, kind in zip(spec.tokens, spec.kinds, strict=True) if kind is sought)


def _around(spec: TokenizerSpec) -> Iterator[str]:
    """What is put around a text, or around its stretches between special tokens."""
    if spec.space_prefix in (SpacePrefix.FIRST, SpacePrefix.MISSING):
        where = "puts a space before each stretch between special tokens"
        yield f"llama.cpp {where}, the tokenizer {spec.space_prefix.value}: such text differs by a space"
    if spec.add_eos and spec.eos is not None:
        yield (
            f"the tokenizer ends every text with {few([spec.tokens[spec.eos]])}; the file says add_eos_token false, "
            "or llama.cpp's tools would end every prompt with it"
        )
    normalized = [token.text for token in spec.added if token.normalized]
    if spec.kind is TokenizerKind.CHARACTERS and spec.space_prefix is SpacePrefix.ALWAYS and normalized:
        yield f"{few(normalized)}: found by the tokenizer only where a text begins, by llama.cpp everywhere"


def _stripped(spec: TokenizerSpec, name: str) -> Iterator[str]:
    """White space that added tokens take with them, which llama.cpp does only for models of some names."""
    behind, before = set[str](), set[str]()
    if any(part in name for part in RSTRIP_NAMES):
        kinds = (TokenKind.CONTROL, TokenKind.USER, TokenKind.UNKNOWN)
        behind = {text for kind in kinds for text in _of_kind(spec, kind)} - set(NOT_STRIPPED)
    elif LSTRIP_NAME in name:
        before = {LSTRIPPED}
    own = {token.text: token for token in spec.added}
    kept = [text for text, token in own.items() if token.lstrip and text not in before]
    if kept:
        yield f"the space before {few(kept)} stays a token of its own: llama.cpp does not support lstrip"
    kept = [text for text, token in own.items() if token.rstrip and text not in behind]
    if kept:
        yield f"the space after {few(kept)} stays in the text: llama.cpp does not support rstrip"
    dropped = [text for text, token in own.items() if not token.rstrip and text in behind]
    dropped += [text for text, token in own.items() if not token.lstrip and text in before]
    if dropped:
        yield f"by the name of the model llama.cpp drops the space beside {few(dropped)}; --name gives another"
    words = [text for text, token in own.items() if token.single_word]
    if words:
        yield f"llama.cpp finds {few(words)} within words too: it does not support single_word"


def _by_text(spec: TokenizerSpec) -> Iterator[str]:
    """Tokens that llama.cpp treats differently from the checkpoint because of their text."""
    kinds = {text: kind for text, kind in zip(spec.tokens, spec.kinds, strict=True) if kind is not TokenKind.UNUSED}
    groups = [sorted(group & kinds.keys()) for group in (*END_GROUPS, *CONTROL_GROUPS)]
    ends, printed, ordinary = _ends(kinds)
    control = ends.union(*(group for group in groups if len(group) == 1))
    if lost := [token.text for token in spec.added if token.text in ordinary]:
        yield f"llama.cpp treats {few(lost)} as ordinary text beside {BESIDE_TOOLS}"
    plain = [text for text in spec.tokens if kinds.get(text) is TokenKind.NORMAL and text in control | printed]
    if plain:
        yield f"llama.cpp treats {few(plain)} as special wherever text has it; here it is ordinary text"
    for group in groups:
        if len(group) > 1 and any(kinds[text] is not TokenKind.CONTROL for text in group):
            yield f"llama.cpp treats one of {few(group)} as a control token, whatever it is here"
    written = {text for index, text in enumerate(spec.tokens) if is_control(spec, index)} | control
    users = [token.text for token in spec.added if not token.special]
    if hidden := [text for text in users if text in written - printed]:
        yield f"llama.cpp treats {few(hidden)} as control tokens, which it does not print"
    if shown := [token.text for token in spec.added if token.special and token.text in printed]:
        yield f"llama.cpp prints {few(shown)}"


def _ends(texts: Collection[str]) -> tuple[set[str], set[str], set[str]]:
    """Of `texts`: those that end a generation, those that are printed, and those that are ordinary."""
    ends, printed, ordinary = {*ENDS.intersection(texts)}, {*PRINTED.intersection(texts)}, set[str]()
    if PRINTED_END in ends and all(ends & others for others in BESIDE_CALLS):
        printed.add(PRINTED_END)
    if PLAIN_END in ends and BESIDE_TOOLS in ends:
        ordinary.add(PLAIN_END)
    return ends - printed - ordinary, printed, ordinary


def _stop_notes(spec: TokenizerSpec) -> Iterator[str]:
    tokens = {text: index for index, text in enumerate(spec.tokens) if spec.kinds[index] is not TokenKind.UNUSED}
    groups = [sorted(group & tokens.keys()) for group in END_GROUPS]
    texts = _ends(tokens)[0].union(*(group for group in groups if len(group) == 1))
    ends = {tokens[text] for text in texts} | ({spec.eos, spec.eot} - {None})
    if more := sorted(index for index in ends if index is not None and index not in spec.stop_tokens):
        yield f"llama.cpp also ends a generation at {few([spec.tokens[index] for index in more])}"
    for group in groups:
        if len(group) > 1:
            yield f"llama.cpp ends a generation at one of {few(group)}"
    if less := sorted(spec.stop_tokens - ends):
        yield f"GGUF has no list of end tokens: llama.cpp goes on at {few([spec.tokens[index] for index in less])}"


def few(items: Sequence[str], limit: int = 5) -> str:
    """The first of `items`, and how many more."""
    shown = " ".join(printable(item, 40) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def _overlaps(spec: TokenizerSpec) -> Iterator[str]:
    for text, theirs, ours in differing(spec, _longest):
        found, expected = (" ".join(map(show, tokens)) or "none" for tokens in (theirs, ours))
        yield f"in {show(text)} llama.cpp finds {found}, the tokenizer {expected}"


def _longest(text: str, tokens: Sequence[str]) -> list[str]:
    """Tokens found by cutting the text at the longest token first."""
    parts: list[tuple[str, bool]] = [(text, False)]
    for token in sorted(tokens, key=lambda token: len(token.encode()), reverse=True):
        cut: list[tuple[str, bool]] = []
        for part, done in parts:
            if done:
                cut.append((part, True))
                continue
            for number, piece in enumerate(part.split(token)):
                cut += [(token, True)] * (number > 0) + [(piece, False)]
        parts = cut
    return [part for part, done in parts if done]

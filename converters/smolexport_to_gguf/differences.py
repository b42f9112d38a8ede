"""Where llama.cpp's tokens, its output or its stops differ from the checkpoint's, one line each.

What gives other tokens on ordinary text is refused instead, see `vocabulary.check_vocabulary`.  Facts: llama.cpp's
src/llama-vocab.cpp, which treats many tokens by their text, and some by the name of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from unicodedata import normalize

from smolexport.text import printable, show
from smolexport.tokenizer import Normalizer, SpacePrefix, TokenizerKind, TokenizerSpec, TokenKind
from smolexport.tokenizer.added_tokens import differing
from smolexport.tokenizer.codec import BYTE_OF

NUL = "\0"
# Names of models for which llama.cpp drops the spaces behind special tokens, and tokens that it then has to find.
RSTRIP_NAMES, NOT_STRIPPED = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")
LSTRIP_NAME, LSTRIPPED = "modern-bert", "[MASK]"
# Texts at which it ends a generation, and which it makes control tokens.
ENDS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> [e~[
    <\uff5cend▁of▁sentence\uff5c>""".split()
)
# Of each group it takes one: for the end of a generation too, and for a control token.
END_GROUPS = tuple(
    frozenset(group.split())
    for group in (
        "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
        "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
        "<|file_sep|>",
    )
)
CONTROL_GROUPS = tuple(
    frozenset(f"<|fim_{a}|> <fim-{a}> <fim_{a}> <\uff5cfim▁{b}\uff5c> <{c}> ▁<{c}> <|code_{a}|> <|{a}|>".split())
    for a, b, c in (("prefix", "begin", "PRE"), ("suffix", "hole", "SUF"), ("middle", "end", "MID"))
)
PRINTED = frozenset("<|channel|> <|message|> <|start|> <|constrain|>".split())  # found everywhere, and shown
# A text that is an end, and what it is beside others of them: found and shown, or ordinary.
PRINTED_END, BESIDE_CALLS = "<|end|>", (frozenset(("<|call|>", "<|calls|>")), frozenset(("<|return|>", "<|flush|>")))
PLAIN_END, BESIDE_TOOLS = "</s>", "<|tool_response>"
IN_UTF8 = frozenset(byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5)


def is_control(spec: TokenizerSpec, index: int) -> bool:
    """Whether a token is written as a control token.

    llama.cpp's converters count every `<|…|>` as one, and its loader does so for many of them.
    """
    text, kind = spec.tokens[index], spec.kinds[index]
    return kind is TokenKind.CONTROL or (kind is TokenKind.USER and text.startswith("<|") and text.endswith("|>"))


def vocabulary_notes(spec: TokenizerSpec, name: str = "") -> list[str]:
    """All differences; `name` is what the file calls the model."""
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
    """What the format or the tokenizer of llama.cpp cannot hold."""
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


def _of_kind(spec: TokenizerSpec, wanted: TokenKind) -> Iterator[str]:
    return (text for text, kind in zip(spec.tokens, spec.kinds, strict=True) if kind is wanted)


def _around(spec: TokenizerSpec) -> Iterator[str]:
    """What stands around a text, or around the stretches of one."""
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
    """White space that added tokens take with them, which llama.cpp knows only by the names of some models."""
    behind, before = set[str](), set[str]()
    if any(part in name for part in RSTRIP_NAMES):
        kinds = (TokenKind.CONTROL, TokenKind.USER, TokenKind.UNKNOWN)
        behind = {text for kind in kinds for text in _of_kind(spec, kind)} - set(NOT_STRIPPED)
    elif LSTRIP_NAME in name:
        before = {LSTRIPPED}
    own = {token.text: token for token in spec.added}
    kept = [text for text, token in own.items() if token.lstrip and text not in before]
    if kept:
        yield f"the space before {few(kept)} stays a token of its own: llama.cpp knows no lstrip"
    kept = [text for text, token in own.items() if token.rstrip and text not in behind]
    if kept:
        yield f"the space behind {few(kept)} stays in the text: llama.cpp knows no rstrip"
    dropped = [text for text, token in own.items() if not token.rstrip and text in behind]
    dropped += [text for text, token in own.items() if not token.lstrip and text in before]
    if dropped:
        yield f"by the name of the model llama.cpp drops the space beside {few(dropped)}; --name gives another"
    words = [text for text, token in own.items() if token.single_word]
    if words:
        yield f"llama.cpp finds {few(words)} within words too: it knows no single_word"


def _by_text(spec: TokenizerSpec) -> Iterator[str]:
    """Tokens that llama.cpp treats by their text in another way than the checkpoint."""
    kinds = {text: kind for text, kind in zip(spec.tokens, spec.kinds, strict=True) if kind is not TokenKind.UNUSED}
    groups = [sorted(group & kinds.keys()) for group in (*END_GROUPS, *CONTROL_GROUPS)]
    ends, printed, ordinary = _ends(kinds)
    control = ends.union(*(group for group in groups if len(group) == 1))
    if lost := [token.text for token in spec.added if token.text in ordinary]:
        yield f"llama.cpp takes {few(lost)} for ordinary text beside {BESIDE_TOOLS}"
    plain = [text for text in spec.tokens if kinds.get(text) is TokenKind.NORMAL and text in control | printed]
    if plain:
        yield f"llama.cpp takes {few(plain)} for a special token wherever text has it; here it is ordinary text"
    for group in groups:
        if len(group) > 1 and any(kinds[text] is not TokenKind.CONTROL for text in group):
            yield f"llama.cpp takes one of {few(group)} for a control token, whatever it is here"
    written = {text for index, text in enumerate(spec.tokens) if is_control(spec, index)} | control
    users = [token.text for token in spec.added if not token.special]
    if hidden := [text for text in users if text in written - printed]:
        yield f"llama.cpp takes {few(hidden)} for control tokens, which it does not print"
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

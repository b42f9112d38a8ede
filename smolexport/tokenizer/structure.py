"""Normalizer and pre-tokenizer of a tokenizer.json, recognised by what they do, never by a hash or a name.

Anything else is refused with what was found: a near miss would silently produce different tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolexport.errors import TokenizerError
from smolexport.text import printable, show
from smolexport.tokenizer.files import refuse, typed
from smolexport.tokenizer.spec import Normalizer, PreTokenizer, SpacePrefix, TokenizerKind

SPACE = "▁"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": PreTokenizer.GPT2,
    rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}|{SYMBOLS}|{TAIL}": PreTokenizer.LLAMA3,
    rf"{CONTRACTIONS}|{WORD}|\p{{N}}|{SYMBOLS}|{TAIL}": PreTokenizer.QWEN2,
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{TAIL}": (
        PreTokenizer.QWEN35
    ),
}
# The patterns above match every character, so keeping the matches and cutting around them are the same.
WHOLE_SPLITS = {("Isolated", False), ("Isolated", True), ("Removed", True)}
SCHEMES = {"always": SpacePrefix.MISSING, "first": SpacePrefix.FIRST, "never": SpacePrefix.NEVER}
REMEDY = "only known byte-level and SentencePiece-style BPE structures can be exported"


@dataclass(frozen=True)
class Structure:
    """The fields of TokenizerSpec that come from the normalizer and pre_tokenizer sections."""

    kind: TokenizerKind
    pre_tokenizer: PreTokenizer
    normalizer: Normalizer = Normalizer.NONE
    cuts_words: bool = False
    space_prefix: SpacePrefix = SpacePrefix.NEVER


def recognise(path: Path, document: dict[str, Any]) -> Structure:
    """Recognise the structure of a tokenizer.json.  Raises TokenizerError naming what was found."""
    normalizers = _steps(path, "normalizer", document.get("normalizer"), "normalizers")
    cutters = _steps(path, "pre_tokenizer", document.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("type") == "ByteLevel" for step in cutters):
        return Structure(TokenizerKind.BYTES, _byte_level(path, cutters), _unicode_form(path, normalizers))
    return _characters(path, normalizers, cutters)


def _steps(path: Path, name: str, section: object, children: str) -> list[dict[str, Any]]:
    """The steps of a section in order; nested sequences are flattened."""
    if section is None:
        return []
    todo = [typed(path, name, section, dict)]
    steps: list[dict[str, Any]] = []
    while todo:
        step = todo.pop()
        if step.get("type") == "Sequence":
            inner = typed(path, f"{name}.{children}", step.get(children), list)
            todo += [typed(path, f"an entry of {name}", entry, dict) for entry in reversed(inner)]
        else:
            steps.append(step)
    return steps


def _unknown(path: Path, name: str, steps: list[dict[str, Any]]) -> TokenizerError:
    found = printable(", then ".join(show(step, 300) for step in steps[:4]), 300) or "nothing"
    return refuse(path, f"unknown {name}: {found}", REMEDY)


def _byte_level(path: Path, steps: list[dict[str, Any]]) -> PreTokenizer:
    *cuts, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True) is not False:
        raise _unknown(path, "pre_tokenizer", steps)
    patterned = last.get("use_regex", True) is not False
    if not cuts and patterned:
        return PreTokenizer.GPT2
    if len(cuts) == 1 and patterned and _cuts_digits(cuts[0]):
        return PreTokenizer.DIGITS_GPT2
    if len(cuts) == 1 and not patterned and (known := _whole_split(cuts[0])):
        return known
    if len(cuts) == 2 and not patterned and _cuts_digits(cuts[0]) and _whole_split(cuts[1]) is PreTokenizer.GPT2:
        return PreTokenizer.DIGITS_GPT2
    raise _unknown(path, "pre_tokenizer", steps)


def _pattern(step: dict[str, Any]) -> str:
    pattern = step.get("pattern")
    return str(pattern.get("Regex")) if isinstance(pattern, dict) else ""


def _whole_split(step: dict[str, Any]) -> PreTokenizer | None:
    how = (str(step.get("behavior")), step.get("invert", False) is True)
    known = step.get("type") == "Split" and how in WHOLE_SPLITS
    return PATTERNS.get(_pattern(step)) if known else None


def _cuts_digits(step: dict[str, Any]) -> bool:
    if step.get("type") == "Digits":
        return step.get("individual_digits") is True
    isolates = step.get("behavior") == "Isolated" and step.get("invert", False) is False
    return step.get("type") == "Split" and isolates and _pattern(step) == r"\p{N}"


def _unicode_form(path: Path, steps: list[dict[str, Any]]) -> Normalizer:
    if not steps:
        return Normalizer.NONE
    if all(step.get("type") == "NFC" for step in steps):
        return Normalizer.NFC
    raise _unknown(path, "normalizer", steps)


def _characters(path: Path, normalizers: list[dict[str, Any]], cutters: list[dict[str, Any]]) -> Structure:
    """SentencePiece's handling of spaces: done by normalizers in older files, by Metaspace in newer ones."""
    kind = TokenizerKind.CHARACTERS
    if len(cutters) == 1 and cutters[0].get("type") == "Metaspace" and not normalizers:
        step = cutters[0]
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) is True else "never")
        prefix = SCHEMES.get(str(scheme))
        if prefix is not None and step.get("replacement") == SPACE:
            cuts = step.get("split", True) is not False
            return Structure(kind, PreTokenizer.NONE, cuts_words=cuts, space_prefix=prefix)
    if cutters:
        raise _unknown(path, "pre_tokenizer", cutters)
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepends = {"type": "Prepend", "prepend": SPACE}
    if normalizers == [prepends, replaces]:
        return Structure(kind, PreTokenizer.NONE, space_prefix=SpacePrefix.ALWAYS)
    if normalizers == [replaces]:
        return Structure(kind, PreTokenizer.NONE)
    if not normalizers:
        raise _unknown(path, "pre_tokenizer", cutters)
    raise _unknown(path, "normalizer", normalizers)

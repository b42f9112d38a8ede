"""Tokens, kinds, merges and added tokens of a folder, every id and text checked.

Notation: v = the model's vocab_size.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolexport.text import show
from smolexport.tokenizer.added_tokens import Merged, merge
from smolexport.tokenizer.files import Companions, refuse, typed
from smolexport.tokenizer.spec import AddedToken, Pairs, TokenizerKind, TokenKind

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """What the model and added_tokens sections hold."""

    tokens: tuple[str, ...]
    kinds: tuple[TokenKind, ...]
    merges: Pairs
    merged: Merged
    ignore_merges: bool
    unknown: int | None


def read_vocabulary(
    path: Path, document: dict[str, Any], kind: TokenizerKind, companions: Companions, vocab_size: int
) -> Vocabulary:
    """Read the vocabulary of a BPE tokenizer.json, with the tokens beside it.  Raises TokenizerError."""
    model = typed(path, "model", document.get("model"), dict)
    _check_model(path, model)
    listed = typed(path, "model.vocab", model.get("vocab"), dict)
    texts = _texts_by_id(path, listed, vocab_size)
    own = _added_tokens(path, document.get("added_tokens") or [], listed, texts, vocab_size)
    merged = merge(companions, listed, own, vocab_size)
    for token in merged.beside:
        _enter(path, texts, token.id, token.text)
    unknown = None
    if model.get("unk_token") is not None:
        text = typed(path, "model.unk_token", model["unk_token"], str)
        unknown = listed.get(text)
        if unknown is None:
            raise refuse(path, f"model.unk_token {show(text)} is not in model.vocab", "correct it or set it to null")
    kinds = _kinds(texts, merged.added, kind, unknown)
    tokens = _fill(texts, vocab_size)
    parts = tuple(texts.get(index, "") for index in range(vocab_size)) if "" in listed else tokens
    return Vocabulary(
        tokens=tokens,
        kinds=tuple(kinds.get(index, TokenKind.UNUSED) for index in range(vocab_size)),
        merges=_merges(path, model.get("merges"), listed, parts),
        merged=merged,
        ignore_merges=typed(path, "model.ignore_merges", model.get("ignore_merges") or False, bool),
        unknown=unknown,
    )


def _check_model(path: Path, model: dict[str, Any]) -> None:
    name = model.get("type", "BPE" if "merges" in model else None)
    if name != "BPE":
        raise refuse(path, f"model.type is {show(name)}", "only BPE tokenizers can be exported")
    if model.get("dropout"):
        raise refuse(path, f"model.dropout is {show(model['dropout'])}: merges at random", "set it to null")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise refuse(path, f"model.{key} is {show(model[key])}", "only BPE without word markers can be exported")


def _identifier(path: Path, text: str, value: object, vocab_size: int) -> int:
    if type(value) is not int or value < 0:
        raise refuse(path, f"the id of token {show(text)} is {show(value)}", "ids are whole numbers from 0 on")
    if value >= vocab_size:
        raise refuse(
            path,
            f"token {show(text)} has id {show(value)}, but the model has only {vocab_size} rows (vocab_size)",
            "take the tokenizer that belongs to the model, or resize the model's embedding",
        )
    return value


def _texts_by_id(path: Path, listed: dict[str, Any], vocab_size: int) -> dict[int, str]:
    if not listed:
        raise refuse(path, "model.vocab is empty", "download the file again")
    texts: dict[int, str] = {}
    for text, value in listed.items():
        index = _identifier(path, typed(path, "a token of model.vocab", text, str), value, vocab_size)
        _enter(path, texts, index, text)
    return texts


def _enter(path: Path, texts: dict[int, str], index: int, text: str) -> None:
    if texts.setdefault(index, text) != text:
        raise refuse(path, f"tokens {show(texts[index])} and {show(text)} share id {index}", "ids must differ")


def _added_tokens(
    path: Path, entries: object, listed: dict[str, Any], texts: dict[int, str], vocab_size: int
) -> list[AddedToken]:
    """The added tokens; `texts` gets those that model.vocab lacks."""
    added: dict[str, AddedToken] = {}
    for entry in typed(path, "added_tokens", entries, list):
        token = typed(path, "an entry of added_tokens", entry, dict)
        text = typed(path, "the content of an added token", token.get("content"), str)
        index = _identifier(path, text, token.get("id"), vocab_size)
        if text in added or listed.get(text, index) != index:
            raise refuse(path, f"the added token {show(text)} appears with two ids", "keep one of them")
        _enter(path, texts, index, text)
        flags = {
            key: typed(path, f"{key} of added token {show(text)}", token.get(key, False), bool)
            for key in ("special", "normalized", "lstrip", "rstrip", "single_word")
        }
        added[text] = AddedToken(index, text, **flags)
    return [token for text, token in added.items() if text]


def _kinds(
    texts: dict[int, str], added: Sequence[AddedToken], kind: TokenizerKind, unknown: int | None
) -> dict[int, TokenKind]:
    kinds = {index: TokenKind.NORMAL for index, text in texts.items() if text}
    if kind is TokenizerKind.CHARACTERS:
        kinds |= {index: TokenKind.BYTE for index, text in texts.items() if BYTE_TOKEN.fullmatch(text)}
    kinds |= {token.id: TokenKind.CONTROL if token.special else TokenKind.USER for token in added}
    if unknown is not None and kind is TokenizerKind.CHARACTERS:
        kinds[unknown] = TokenKind.UNKNOWN
    return kinds


def _fill(texts: dict[int, str], vocab_size: int) -> tuple[str, ...]:
    """Texts of all ids; a placeholder where the tokenizer has none, or an empty one."""
    taken = set(texts.values())

    def placeholder(index: int) -> str:
        text = f"[PAD{index}]"
        while text in taken:
            text += "_"
        return text

    return tuple(texts.get(index) or placeholder(index) for index in range(vocab_size))


def _merges(path: Path, entries: object, listed: dict[str, Any], tokens: tuple[str, ...]) -> Pairs:
    """The merges as pairs.  Of a pair listed twice the last position counts, as in the tokenizers library.

    Empties `entries` as it goes: the parsed merges are most of a tokenizer's memory.
    """
    left, right = array("L"), array("L")
    entries = typed(path, "model.merges", entries, list)
    entries.reverse()
    while entries:
        entry = entries.pop()
        pair = tuple(entry.split(" ")) if type(entry) is str else tuple(entry) if type(entry) is list else ()
        try:
            # The usual case first: there may be 280,000 of them.
            if len(pair) == 2 and pair[0] in listed and pair[1] in listed and pair[0] + pair[1] in listed:
                left.append(listed[pair[0]])
                right.append(listed[pair[1]])
                continue
        except TypeError:  # a list or an object where a string belongs
            pair = ()
        number = len(left)
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise refuse(path, f"merge {number} is {show(entry)}", "a merge is a pair of tokens")
        absent = next(part for part in (*pair, "".join(pair)) if part not in listed)
        found = f"merge {number} {show(entry)} needs the token {show(absent)}, which model.vocab lacks"
        raise refuse(path, found, "vocabulary and merges belong to different tokenizers; download the file again")
    last = {pair: number for number, pair in enumerate(zip(left, right, strict=True))}
    if len(last) < len(left):
        kept = sorted(last.values())
        left, right = (array("L", [ids[number] for number in kept]) for ids in (left, right))
    return Pairs(tokens, left, right)

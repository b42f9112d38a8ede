"""Added tokens that want the same characters of a text: the tokenizer finds one of them, another program another.

The tokenizer looks for the tokens that are not normalized first, then for the others; each time from left to right,
and for the longest at each place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from smolexport.tokenizer.spec import TokenizerSpec

MOST_TEXTS = 200  # looked at; real tokenizers have none
LONGEST_OVERLAP = 64  # characters
MOST_WORK = 10_000_000  # places looked at for tokens within others
MOST_FOUND = 3

Find = Callable[[str, Sequence[str]], list[str]]


def differing(spec: TokenizerSpec, find: Find) -> list[tuple[str, list[str], list[str]]]:
    """A few texts with what `find`, called with text and tokens, finds there, and what else the tokenizer finds."""
    passes = [[token.text for token in spec.added if token.normalized is state] for state in (False, True)]
    every = [*passes[0], *passes[1]]
    tried = ((text, find(text, every), _in_passes(text, passes)) for text in islice(_texts(passes), MOST_TEXTS))
    return list(islice((one for one in tried if one[1] != one[2]), MOST_FOUND))


def _texts(passes: Sequence[Sequence[str]]) -> Iterator[str]:
    normalized = set(passes[1]) if passes[0] else set[str]()
    for first, later, size in _overlaps([*passes[0], *passes[1]]):
        if len(first.encode()) <= len(later.encode()) or (first in normalized and later not in normalized):
            yield first + later[size:]
    lengths = sorted({len(text) for text in passes[0]})
    if len(lengths) * sum(map(len, normalized)) <= MOST_WORK:
        raw = set(passes[0])
        for text in passes[1]:
            for size in lengths:
                places = range(len(text) - size + 1)
                yield from (text for at in places if text[at : at + size] in raw)


def _overlaps(texts: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """(first, later, size): the last `size` characters of `first` open `later`."""
    ends: dict[str, list[str]] = {}
    for text in texts:
        for size in range(1, min(len(text), LONGEST_OVERLAP + 1)):
            ends.setdefault(text[-size:], []).append(text)
    for later in texts:
        for size in range(1, min(len(later), LONGEST_OVERLAP + 1)):
            yield from ((first, later, size) for first in ends.get(later[:size], ()))


def _in_passes(text: str, passes: Sequence[Sequence[str]]) -> list[str]:
    parts: list[tuple[str, bool]] = [(text, False)]
    for tokens in passes:
        parts = [cut for part in parts for cut in ([part] if part[1] else _cut(part[0], tokens))]
    return [part for part, found in parts if found]


def leftmost(text: str, tokens: Sequence[str]) -> list[str]:
    """The tokens found from left to right, the longest at each place."""
    return [part for part, found in _cut(text, tokens) if found]


def _cut(text: str, tokens: Sequence[str]) -> list[tuple[str, bool]]:
    parts, start, at = list[tuple[str, bool]](), 0, 0
    while at < len(text):
        match = max((token for token in tokens if text.startswith(token, at)), key=len, default="")
        if match:
            parts += [(text[start:at], False), (match, True)]
            start = at + len(match)
        at += len(match) or 1
    return [*parts, (text[start:], False)]

"""Which tokens do the merges build?

A tokenizer that was trained, or converted from SentencePiece, builds each of its normal tokens from that token's
own text.  Where this holds, two rules that look different give the same tokens:

* taking a piece whole because it is a token (`ignore_merges`), and merging it;
* merging any two neighbours whose join is a token, best score first (SentencePiece, llama.cpp), and merging only
  the listed pairs, first listed first (tokenizers).  For: let t = a + b be built by the merges.  If t could also
  appear as neighbours a' + b' with another border, then the merge across that border which t's own history makes
  would have been possible earlier, and better than all others inside t; nothing outside t can have prevented it,
  since nothing that overlaps t's edges happened.  So each token has one history, and the rank of its last merge
  orders the tokens as the list orders the pairs.

Where it does not hold, the two rules differ on some text, and a converter has to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smolexport.tokenizer.spec import TokenizerSpec, TokenKind

LONGEST = 512  # characters; a longer token counts as not built, so that a hostile file cannot make us work forever
Ranks = Mapping[tuple[str, str], int]


def last_ranks(tokens: Sequence[str], kinds: Sequence[TokenKind], merges: Sequence[tuple[str, str]]) -> dict[int, int]:
    """For each normal token that its own text builds: the rank of the last merge, -1 for a single character."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    alphabet = {text for text, kind in zip(tokens, kinds, strict=True) if kind is TokenKind.NORMAL and len(text) == 1}
    found: dict[int, int] = {}
    for index, (text, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind is TokenKind.NORMAL:
            rank = _build(text, ranks, alphabet)
            if rank is not None:
                found[index] = rank
    return found


def unbuilt_tokens(spec: TokenizerSpec) -> tuple[int, ...]:
    """Ids of the normal tokens that the merges do not build from the token's own text."""
    built = last_ranks(spec.tokens, spec.kinds, spec.merges)
    return tuple(i for i, kind in enumerate(spec.kinds) if kind is TokenKind.NORMAL and i not in built)


def _build(text: str, ranks: Ranks, alphabet: set[str]) -> int | None:
    """The rank of the merge that completes `text`, -1 if there is nothing to merge, None if it stays in parts."""
    if len(text) > LONGEST or not alphabet.issuperset(text):
        return None
    parts = list(text)
    last = -1
    absent = len(ranks)
    while len(parts) > 1:
        best, where = absent, 0
        for at in range(len(parts) - 1):
            rank = ranks.get((parts[at], parts[at + 1]), absent)
            if rank < best:
                best, where = rank, at
        if best == absent:
            return None
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
        last = best
    return last

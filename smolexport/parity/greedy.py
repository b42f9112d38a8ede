"""Number of tokens for which a candidate's greedy continuation equals the reference's.

Up to the first difference both see the same tokens.  So the candidate is fed the reference's continuation one token at
a time, as in real generation, until it chooses a different token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smolexport.parity.results import Divergence
from smolexport.run.session import Session, TextCodec

SHOWN = 24  # tokens shown before a divergence


@dataclass(frozen=True)
class Continuation:
    """The reference's greedy continuation of `prompt`.

    Attributes:
        prompt: [p] int64.
        tokens: chosen tokens; the last one may be a stop token.
        margins: for each token, the gap between the largest and the second largest logit.
    """

    prompt: NDArray[np.int64]
    tokens: tuple[int, ...]
    margins: tuple[float, ...]


def continue_greedily(session: Session, prompt: NDArray[np.int64], count: int, stop: frozenset[int]) -> Continuation:
    """Choose the most likely token up to `count` times, or until a token of `stop` is chosen."""
    session.rewind(0)
    tokens: list[int] = []
    margins: list[float] = []
    feed: NDArray[np.int64] | list[int] = prompt
    while len(tokens) < count:
        row = session.append(feed, last_only=True)[-1]
        tokens.append(int(row.argmax()))
        # infinite for a vocabulary of one token
        second, first = np.partition(row, len(row) - 2)[-2:] if len(row) > 1 else (-np.inf, row[0])
        margins.append(float(first) - float(second))
        if tokens[-1] in stop:
            break
        feed = tokens[-1:]
    return Continuation(prompt, tuple(tokens), tuple(margins))


def agree(session: Session, reference: Continuation, codec: TextCodec) -> Divergence:
    """Find where the session's greedy choice first differs from `reference`; `codec` decodes the tokens around it."""
    session.rewind(0)
    feed: NDArray[np.int64] | Sequence[int] = reference.prompt
    for position, expected in enumerate(reference.tokens):
        chosen = int(session.append(feed, last_only=True)[-1].argmax())
        if chosen != expected:
            before = [*reference.prompt.tolist(), *reference.tokens[:position]][-SHOWN:]
            texts = (_text(codec, tokens) for tokens in (before, [expected], [chosen]))
            margin = reference.margins[position]
            return Divergence(len(reference.tokens), position, margin, expected, chosen, *texts)
        feed = [chosen]
    return Divergence(len(reference.tokens))


def _text(codec: TextCodec, tokens: Iterable[int]) -> str:
    """The text of `tokens`; incomplete characters appear as the codec decodes them."""
    decoder = codec.decoder()
    return "".join([*(decoder.push(token) for token in tokens), decoder.flush()])

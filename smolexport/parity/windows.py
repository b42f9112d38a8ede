"""What sessions are fed: windows of the text for their logits, in blocks of bounded size, and prompts to continue.

Windows are as in llama-perplexity: no overlap; an incomplete last window is dropped; if the model uses BOS, it replaces
the first token of each window; only the predictions at positions w/2 … w-2 are scored, so every scored token has at
least half a window before it.  A text shorter than a window is one window of its own length.

Greedy agreement is the number of tokens for which a candidate's greedy continuation equals the reference's.  Up to the
first difference both see the same tokens, so the candidate is fed the reference's continuation one token at a time, as
in real generation, until it chooses a different token.

Notation: w = tokens in a window, n = rows of a block, v = vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import SessionError, UsageError
from smolexport.parity.results import Divergence
from smolexport.run.session import Session, TextCodec

SHORTEST_TEXT = 4
SHOWN = 24  # tokens shown before a divergence


@dataclass(frozen=True)
class Window:
    """Tokens [w] int64 of one window; the first scored prediction is the one made at position `first`."""

    tokens: NDArray[np.int64]
    first: int

    @property
    def scored(self) -> int:
        """Number of scored predictions."""
        return len(self.tokens) - 1 - self.first

    @property
    def following(self) -> NDArray[np.int64]:
        """True next tokens of the scored predictions: [scored]."""
        return self.tokens[self.first + 1 :]


def cut(ids: Sequence[int], length: int, *, bos: int | None = None, limit: int | None = None) -> list[Window]:
    """Cut `ids` into windows of `length` tokens, at most `limit` of them.

    A text shorter than `length` gives one window of its own length.  Raises UsageError if the text or the window has
    fewer than four tokens, or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} windows to score: use at least 1")
    if len(ids) < SHORTEST_TEXT:
        raise UsageError(f"the text has {len(ids)} tokens, too few to score: use at least {SHORTEST_TEXT} tokens")
    length = min(length, len(ids))
    if length < SHORTEST_TEXT:
        raise UsageError(f"a window of {length} tokens has nothing to score: use at least {SHORTEST_TEXT} tokens")
    starts = range(0, len(ids) // length * length, length)[:limit]
    return [Window(_with_bos(ids[start : start + length], bos), length // 2) for start in starts]


def prompts(ids: Sequence[int], length: int, count: int, *, bos: int | None = None) -> list[NDArray[np.int64]]:
    """At most `count` prompts of `length` tokens from `ids` at even distances; fewer and shorter for a short text."""
    length = min(length, len(ids))
    count = min(count, len(ids) // length) if length else 0
    if not count:
        return []
    step = len(ids) // count
    return [_with_bos(ids[start : start + length], bos) for start in range(0, count * step, step)]


def block_rows(vocab_size: int, block_bytes: int) -> int:
    """Number of rows of float32 logits that fit into `block_bytes`, at least one."""
    return max(1, block_bytes // (4 * vocab_size))


def blocks(session: Session, window: Window, rows: int) -> Iterator[NDArray[np.float32]]:
    """The session's logits at the scored positions of `window`, in order, in blocks of at most `rows` rows.

    The session is rewound to 0 first and then fed the window; nothing else may use it until the last block.
    Raises SessionError if a block has the wrong shape.
    """
    session.rewind(0)
    if window.first:
        session.append(window.tokens[: window.first], last_only=True)
    parts = -(-window.scored // rows)
    # even parts instead of full ones and a remainder: a block of one row uses other kernels
    for part in np.array_split(window.tokens[window.first : -1], parts):
        # no local variable for the block: the suspended generator would keep it alive while the next one is made
        yield _checked(session.append(part), (len(part), session.vocab_size))


def _checked(logits: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    if logits.shape != shape:
        raise SessionError(
            f"the runtime returned logits of shape {logits.shape} for {shape[0]} tokens, expected {shape}"
        )
    return logits


def _with_bos(ids: Sequence[int], bos: int | None) -> NDArray[np.int64]:
    return np.array(ids if bos is None else [bos, *ids[1:]], np.int64)


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

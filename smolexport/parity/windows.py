"""Windows of the text's tokens, and a session's logits over one window in blocks of bounded size.

Windows are as in llama-perplexity: no overlap; an incomplete last window is dropped; if the model uses BOS, it replaces
the first token of each window; only the predictions at positions w/2 … w-2 are scored, so every scored token has at
least half a window before it.  A text shorter than a window is one window of its own length.

Notation: w = tokens in a window, n = rows of a block, v = vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import SessionError, UsageError
from smolexport.run.session import Session

SHORTEST_TEXT = 4


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
    count = len(ids) // length
    windows = []
    for start in range(0, (count if limit is None else min(count, limit)) * length, length):
        windows.append(Window(_with_bos(ids[start : start + length], bos), length // 2))
    return windows


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
    tokens = np.array(ids, dtype=np.int64)
    if bos is not None:
        tokens[0] = bos
    return tokens

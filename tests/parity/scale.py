"""Peak memory of the statistics alone, in a process of its own, at the vocabulary of Llama 3 and SmolLM3.

    python -m tests.parity.scale [POSITIONS] [FILES]

One window of that many tokens, the reference and files of the same weights: all pairs and no model.  Prints MB.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.parity.inputs import Candidate, Settings
from smolexport.parity.logit_cache import LogitCache
from smolexport.parity.peak_memory import peak_rss
from smolexport.parity.reference import run_reference
from smolexport.parity.scoring import score_group

VOCABULARY = 128_256


class Codec:
    stop_tokens: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return [7 * number % VOCABULARY for number in range(len(text))]


class Rows:
    """Logits that cost next to nothing: one row of random numbers, turned by the token."""

    vocab_size, codec = VOCABULARY, Codec()

    def __init__(self, context: int, noise: float) -> None:
        self.context = context
        self._row = np.random.default_rng(0).standard_normal(VOCABULARY, np.float32)
        self._row += noise * np.random.default_rng(1).standard_normal(VOCABULARY, np.float32)

    def rewind(self, length: int) -> None:
        pass

    def append(self, tokens: Sequence[int], *, last_only: bool = False) -> NDArray[np.float32]:
        tokens = tokens[-1:] if last_only else tokens
        logits = np.empty((len(tokens), VOCABULARY), np.float32)
        for row, token in zip(logits, tokens, strict=True):
            row[token:], row[:token] = self._row[: VOCABULARY - token], self._row[VOCABULARY - token :]
        return logits

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def candidate(number: int, positions: int) -> Candidate:
    """A model whose runtime is made of `Rows`."""
    runtime: Any = ModuleType(f"rows{number}")
    runtime.NAME, runtime.version = "rows", lambda: "1"
    runtime.open = lambda path, **options: Rows(positions, number / 10)
    return Candidate(Path(__file__), "rows", str(number), runtime, 1, 16.0)


def main(positions: int = 4096, files: int = 3) -> None:
    """Score and print the peak, less what the interpreter and its libraries take."""
    settings = Settings(
        window=positions, greedy_tokens=0, repetitions=0, memory=False, prompt_tokens=1, attribution=False
    )
    before = peak_rss()
    reference, *others = (candidate(number, positions) for number in range(files + 1))
    with LogitCache(None) as cache:
        base = run_reference(reference, "x" * positions, settings, cache, None, lambda *step: None)
        members = score_group(reference, base, others, settings, lambda *step: None)
    assert all(member.accuracy.positions == positions - 1 - positions // 2 for member in members)
    print((peak_rss() - before) // 1_000_000)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

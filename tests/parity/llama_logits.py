"""llama.cpp's file of logits (`llama-perplexity --kl-divergence-base`), written and read from its layout.

| bytes | what |
|---|---|
| `_logits_` | magic |
| 3 int32 | n_ctx, n_vocab, n_chunk |
| n_ctx n_chunk int32 | the tokens |
| per scored position | float scale, float minimum, n_vocab uint16, padded to an even count: log p = scale q + minimum |

Positions n_ctx/2 … n_ctx-2 of every chunk are scored.  Values are cut 24 nats below the row's largest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["read", "write"]

MAGIC = b"_logits_"
RANGE, STEPS = 24.0, 65535


def _row(vocab: int) -> np.dtype[Any]:
    return np.dtype([("scale", "<f4"), ("least", "<f4"), ("codes", "<u2", (vocab + vocab % 2,))])


def write(path: Path, tokens: NDArray[np.int32], context: int, logits: NDArray[np.float32]) -> None:
    """`logits` [rows, v] of the scored positions of `tokens` [chunks * context]."""
    rows, vocab = logits.shape
    best = logits.max(axis=1, keepdims=True)
    exact = logits.astype(np.float64) - best
    logs = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    least = np.maximum(logs.min(axis=1), logs.max(axis=1) - RANGE)
    scale = (logs.max(axis=1) - least) / STEPS
    out = np.zeros(rows, _row(vocab))
    out["scale"], out["least"] = scale, least
    codes = np.clip((logs - least[:, None]) / scale[:, None], 0, STEPS)
    out["codes"][:, :vocab] = np.rint(codes)
    header = np.array([context, vocab, len(tokens) // context], "<i4")
    path.write_bytes(MAGIC + header.tobytes() + tokens.astype("<i4").tobytes() + out.tobytes())


def read(path: Path) -> tuple[NDArray[np.int32], int, NDArray[np.float32]]:
    """Tokens [chunks * context], the context, and the log-probabilities [rows, v] of the scored positions."""
    data = path.read_bytes()
    assert data[:8] == MAGIC
    context, vocab, chunks = (int(n) for n in np.frombuffer(data, "<i4", 3, 8))
    tokens = np.frombuffer(data, "<i4", context * chunks, 20)
    rows = np.frombuffer(data, _row(vocab), chunks * (context - 1 - context // 2), 20 + tokens.nbytes)
    logs = rows["scale"][:, None] * rows["codes"][:, :vocab].astype(np.float32) + rows["least"][:, None]
    return tokens.astype(np.int32), context, logs

"""Encoded tensors in order: row chunks are read, reordered, checked and encoded on a few threads.

The kernels release the interpreter lock, so threads scale; at most `threads + 1` chunks are alive at a time, so
memory does not grow with the model.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.checkpoint import Checkpoint, StoredTensor
from smolexport.errors import TensorError
from smolexport.plan import Entry
from smolexport.quant import BlockFormat, first_nonfinite

__all__ = ["encoded_chunks", "thread_count"]

CHUNK_BYTES = 8 << 20
HALF_MAX = 65504.0  # largest float16: smaller weights overflow no format, since all scales are at most as large
BLOCK_MAX = 2.0**30  # no block format reaches so far, and squares of larger weights overflow inside the searches


def thread_count(threads: int | None = None) -> int:
    """`threads`, or the processors that this process may use, at most 16."""
    if threads is not None:
        return max(1, threads)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(usable, 16)


def encoded_chunks(
    checkpoint: Checkpoint, entries: tuple[Entry, ...], threads: int | None = None
) -> Iterator[tuple[Entry, NDArray[np.uint8]]]:
    """Yield (entry, bytes) for consecutive row chunks of all entries, in order.

    Raises:
        TensorError: a weight is not finite, or the format cannot hold it.
        CheckpointError: the checkpoint's files changed under the export.
    """
    workers = thread_count(threads)
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        pending: deque[tuple[Entry, Future[NDArray[np.uint8]]]] = deque()
        try:
            for entry, start, stop in _chunks(entries):
                pending.append((entry, pool.submit(_encode, checkpoint, entry, start, stop)))
                if len(pending) > workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def _chunks(entries: tuple[Entry, ...]) -> Iterator[tuple[Entry, int, int]]:
    for entry in entries:
        rows, columns = entry.shape if len(entry.shape) == 2 else (1, entry.shape[0])
        unit = entry.transform.head_dim if entry.transform else 1
        step = max(unit, CHUNK_BYTES // (4 * columns) // unit * unit)
        for start in range(0, rows, step):
            yield entry, start, min(start + step, rows)


def _encode(checkpoint: Checkpoint, entry: Entry, start: int, stop: int) -> NDArray[np.uint8]:
    if entry.tensor is None:
        return entry.format.encode(np.asarray(entry.values, np.float32)[None])
    stored = checkpoint.stored[entry.tensor]
    rows = stored.read_rows(start, stop)
    _refuse_nonfinite(stored, rows, start)
    moved = rows
    if entry.transform:
        moved = entry.transform(rows) if len(entry.shape) == 2 else entry.transform(rows.T).T
    encoded = entry.format.encode(np.ascontiguousarray(moved))
    if _largest(rows) > HALF_MAX:
        _refuse_overflow(stored, rows, start, entry.format, encoded)
    return encoded


def _refuse_nonfinite(stored: StoredTensor, rows: NDArray[Any], start: int) -> None:
    where = first_nonfinite(rows)
    if where is None:
        return
    raise TensorError(f"{_described(stored, rows, start, *where)}; weights must be finite")


def _refuse_overflow(
    stored: StoredTensor, rows: NDArray[Any], start: int, form: BlockFormat, encoded: NDArray[np.uint8]
) -> None:
    """Refuse finite weights that the format turned, or their block's scale, into an infinity."""
    columns = rows.shape[1]
    beyond = form.block > 1 and _largest(rows) > BLOCK_MAX
    if beyond or first_nonfinite(form.decode(encoded, columns)) is not None:
        where = divmod(int(np.argmax(np.abs(rows.astype(np.float32)))), columns)
        found = _described(stored, rows, start, *where)
        raise TensorError(f"{found}, which {form.name} cannot hold; take f32 or bf16, or repair the checkpoint")


def _largest(rows: NDArray[Any]) -> float:
    """Largest magnitude, without a copy: among floats of one sign the order of the bits is that of the magnitudes."""
    signed, unsigned = rows.view(f"i{rows.itemsize}"), rows.view(f"u{rows.itemsize}")
    sign = np.array(1 << (8 * rows.itemsize - 1), unsigned.dtype)
    positive = np.array(max(int(signed.max()), 0), unsigned.dtype)
    negative = np.array(int(unsigned.max()) & ~int(sign), unsigned.dtype)
    return float(np.maximum(positive, negative).view(rows.dtype).astype(np.float32))


def _described(stored: StoredTensor, rows: NDArray[Any], start: int, row: int, column: int) -> str:
    """File, tensor, value and its place in the checkpoint; `rows` begin at row `start`."""
    place = f"[{row + start}, {column}]" if len(stored.shape) == 2 else f"[{column}]"
    return f"{stored.path}: tensor {stored.name} has {rows[row, column]} at {place}"

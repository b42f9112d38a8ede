"""Encoded rows for any number of outputs in one pass: chunks are read once, checked, and encoded on a few threads.

The kernels release the interpreter lock, so threads scale; at most `threads + 1` chunks are alive at a time, so
memory does not grow with the model.  What several outputs want in the same format, or as repackings of one lattice,
is quantized once.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.conversion.plan import Entry, Made
from smolexport.errors import TensorError
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.spec import Tensor
from smolexport.model.tensor_file import StoredTensor
from smolexport.quant.arrays import first_nonfinite, largest
from smolexport.text import label

CHUNK_BYTES = 2 << 20  # as float32; half of that costs a tenth more time
ALIVE_BYTES = 18 << 20  # of all chunks at a time: with more than eight threads they become smaller
SMALL = 32768.0  # below this no format overflows, whatever it derives from a weight
BLOCK_MAX = 2.0**30  # no block format reaches so far, and squares of larger weights overflow inside the searches


@dataclass(frozen=True)
class Encoded:
    """Rows [n, row_bytes] of `entry` from row `start` on, for output number `output`."""

    output: int
    entry: Entry
    start: int
    rows: NDArray[np.uint8]


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of a tensor, and every (output, entry) that wants them."""

    tensor: Tensor | None
    wanted: tuple[tuple[int, Entry], ...]
    start: int
    stop: int


def thread_count(threads: int | None = None) -> int:
    """`threads`, or the processors that this process may use, at most 16."""
    if threads is not None:
        return max(1, threads)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(usable, 16)


def encoded_chunks(
    checkpoint: Checkpoint, outputs: Sequence[Sequence[Entry]], threads: int | None = None
) -> Iterator[Encoded]:
    """Yield the encoded rows of all entries of all `outputs`, tensor by tensor, each read once.

    Raises:
        TensorError: a weight is not finite, or a format cannot hold it.
        CheckpointError: the checkpoint's files changed under the export.
    """
    workers = thread_count(threads)
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        pending: deque[Future[list[Encoded]]] = deque()
        try:
            for chunk in _chunks(outputs, min(CHUNK_BYTES, ALIVE_BYTES // (workers + 1))):
                pending.append(pool.submit(_encode, checkpoint, chunk))
                if len(pending) > workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _chunks(outputs: Sequence[Sequence[Entry]], nbytes: int) -> Iterator[Chunk]:
    """All that `outputs` want, in chunks of at most `nbytes` as float32, or of one unit of rows."""
    by_tensor: dict[Tensor, list[tuple[int, Entry]]] = {}
    generated = []
    for number, entries in enumerate(outputs):
        for entry in entries:
            if entry.tensor is None:
                generated.append(Chunk(None, ((number, entry),), 0, 1))
            else:
                by_tensor.setdefault(entry.tensor, []).append((number, entry))
    for tensor, wanted in by_tensor.items():
        unit = max(entry.transform.head_dim if entry.transform else 1 for _, entry in wanted)
        step = max(unit, nbytes // (4 * tensor.columns) // unit * unit)
        for start in range(0, tensor.rows, step):
            yield Chunk(tensor, tuple(wanted), start, min(start + step, tensor.rows))
    yield from generated


def _encode(checkpoint: Checkpoint, chunk: Chunk) -> list[Encoded]:
    if chunk.tensor is None:
        return [
            Encoded(number, entry, 0, entry.format.encode(np.asarray(entry.values, np.float32)[None]))
            for number, entry in chunk.wanted
        ]
    stored = checkpoint.stored[chunk.tensor]
    rows = stored.read_rows(chunk.start, chunk.stop)
    magnitude = largest(rows)
    if not isfinite(magnitude):
        raise _nonfinite(stored, rows, chunk.start)
    large = magnitude > SMALL
    made: Made = {}
    found = []
    for number, entry in chunk.wanted:
        if entry.format.canonical and entry.encoder is None and len(chunk.wanted) == 1 and entry.via is None:
            encoded = entry.format.encode(rows, entry.importance)  # one step where nothing is shared
        else:
            encoded = entry.encode(rows, chunk.start, made)
            encoded = entry.format.repack(encoded, rows.shape[1]) if entry.format.canonical else encoded
        if large:
            _refuse_overflow(stored, rows, chunk.start, entry, encoded)
        elif entry.importance is not None or entry.encoder is not None:
            _refuse_importance(stored, rows, entry, encoded)
        found.append(Encoded(number, entry, chunk.start, _moved(encoded, entry)))
    return found


def _moved(encoded: NDArray[np.uint8], entry: Entry) -> NDArray[np.uint8]:
    """Encoded rows in the order of the output; of a vector, whose elements are its rows, the elements."""
    if entry.transform is None:
        return encoded
    if entry.is_matrix:
        return entry.transform(encoded)
    return entry.transform(encoded.reshape(entry.shape[0], -1)).reshape(1, -1)


def _nonfinite(stored: StoredTensor, rows: NDArray[Any], start: int) -> TensorError:
    where = first_nonfinite(rows) or (0, 0)
    return TensorError(f"{_described(stored, rows, start, *where)}; weights must be finite")


def _refuse_overflow(
    stored: StoredTensor, rows: NDArray[Any], start: int, entry: Entry, encoded: NDArray[np.uint8]
) -> None:
    """Refuse finite weights that the format turned, or their block's scale, into an infinity."""
    form, columns = entry.format, rows.shape[1]
    beyond = form.block > 1 and largest(rows) > BLOCK_MAX
    if beyond or first_nonfinite(form.decode(encoded, columns)) is not None:
        where = divmod(int(np.argmax(np.abs(rows.astype(np.float32)))), columns)
        name = (entry.via or form).name
        found = _described(stored, rows, start, *where)
        raise TensorError(f"{found}, which {name} cannot hold; take f32 or bf16, or repair the checkpoint")


def _refuse_importance(stored: StoredTensor, rows: NDArray[Any], entry: Entry, encoded: NDArray[np.uint8]) -> None:
    """Refuse what a search made of weights and an importance whose products no float32 holds."""
    if first_nonfinite(entry.format.decode(encoded, rows.shape[1])) is not None:
        raise TensorError(
            f"{stored.path}: tensor {label(stored.name)}: {entry.format.name} finds no finite scale under its "
            "importances; they are out of range, make the importance matrix anew"
        )


def _described(stored: StoredTensor, rows: NDArray[Any], start: int, row: int, column: int) -> str:
    """File, tensor, value and its place in the checkpoint; `rows` begin at row `start`."""
    place = f"[{row + start}, {column}]" if len(stored.shape) > 1 else f"[{column}]"
    return f"{stored.path}: tensor {label(stored.name)} has {rows[row, column]} at {place}"

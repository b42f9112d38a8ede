"""Encoded rows for any number of outputs in one pass: chunks are read once, checked, and encoded on a few threads.

The kernels release the interpreter lock, so threads scale; at most `threads + 1` chunks are alive at a time, so
memory does not grow with the model.  What several outputs store in the same format, or repacked from the same canonical
format, is quantized once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.conversion.plan import EncodedBy, Entry
from smolexport.errors import TensorError
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.spec import Tensor
from smolexport.model.tensor_file import StoredTensor
from smolexport.processes import thread_count
from smolexport.quant.arrays import first_nonfinite, largest
from smolexport.text import label

CHUNK_BYTES = 2 << 20  # as float32; half of that costs a tenth more time
ALIVE_BYTES = 18 << 20  # of all chunks at a time: with more than eight threads they become smaller
SMALL = 32768.0  # below this no format overflows, whatever it derives from a weight
BLOCK_MAX = 2.0**30  # no block format reaches this far, and squares of larger weights overflow inside the searches


@dataclass(frozen=True)
class Encoded:
    """Rows [n, row_bytes] of `entry` from row `start` on, for output number `output`."""

    output: int
    entry: Entry
    start: int
    rows: NDArray[np.uint8]


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of a tensor, and every (output, entry) that stores them."""

    tensor: Tensor | None
    entries: tuple[tuple[int, Entry], ...]
    start: int
    stop: int


def encoded_chunks(
    checkpoint: Checkpoint, outputs: Sequence[Sequence[Entry]], threads: int | None = None
) -> Iterator[Encoded]:
    """Yield the encoded rows of all entries of all `outputs`, tensor by tensor, each read once.

    Raises:
        TensorError: a weight is not finite, or a format cannot hold it.
        CheckpointError: the checkpoint's files changed during the export.
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
    """All rows of `outputs`, in chunks of at most `nbytes` as float32, or of one unit of rows."""
    by_tensor: dict[Tensor, list[tuple[int, Entry]]] = {}
    generated = []
    for number, entries in enumerate(outputs):
        for entry in entries:
            if entry.tensor is None:
                generated.append(Chunk(None, ((number, entry),), 0, 1))
            else:
                by_tensor.setdefault(entry.tensor, []).append((number, entry))
    for tensor, found in by_tensor.items():
        unit = max(entry.transform.head_dim if entry.transform else 1 for _, entry in found)
        step = max(unit, nbytes // (4 * tensor.columns) // unit * unit)
        for start in range(0, tensor.rows, step):
            yield Chunk(tensor, tuple(found), start, min(start + step, tensor.rows))
    yield from generated


def _encode(checkpoint: Checkpoint, chunk: Chunk) -> list[Encoded]:
    if chunk.tensor is None:
        return [
            Encoded(number, entry, 0, entry.store(np.asarray(entry.values, np.float32)[None]))
            for number, entry in chunk.entries
        ]
    stored = checkpoint.stored[chunk.tensor]
    rows = stored.read_rows(chunk.start, chunk.stop)
    magnitude = largest(rows)
    if not isfinite(magnitude):
        where = first_nonfinite(rows) or (0, 0)
        raise TensorError(f"{_described(stored, rows, chunk.start, *where)}; weights must be finite")
    known: EncodedBy | None = {} if len(chunk.entries) > 1 else None
    found = []
    for number, entry in chunk.entries:
        encoded = entry.store(rows, chunk.start, known)
        if magnitude > SMALL or entry.importance is not None or entry.encoder is not None:
            _check_finite(stored, rows, chunk.start, entry, encoded, magnitude)
        found.append(Encoded(number, entry, chunk.start, encoded))
    return found


def _check_finite(
    stored: StoredTensor, rows: NDArray[Any], start: int, entry: Entry, encoded: NDArray[np.uint8], magnitude: float
) -> None:
    """Refuse finite weights that the format encodes as infinities, themselves or as their block's scale.

    Smaller weights do so only if their products with an importance overflow float32.
    """
    form, columns = entry.format, rows.shape[1]
    beyond = form.block > 1 and magnitude > BLOCK_MAX
    if not beyond and first_nonfinite(form.decode(encoded, columns)) is None:
        return
    if magnitude > SMALL:
        where = divmod(int(np.argmax(np.abs(rows.astype(np.float32)))), columns)
        name = (entry.rounded_through or form).name
        found = _described(stored, rows, start, *where)
        raise TensorError(f"{found}, which {name} cannot hold; use f32 or bf16, or repair the checkpoint")
    raise TensorError(
        f"{stored.path}: tensor {label(stored.name)}: {form.name} finds no finite scale under its importances, which "
        "are out of range; compute the importance matrix again"
    )


def _described(stored: StoredTensor, rows: NDArray[Any], start: int, row: int, column: int) -> str:
    """File, tensor, value and its position in the checkpoint; `rows` begin at row `start`."""
    place = f"[{row + start}, {column}]" if len(stored.shape) > 1 else f"[{column}]"
    return f"{stored.path}: tensor {label(stored.name)} has {rows[row, column]} at {place}"

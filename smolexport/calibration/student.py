"""A planned output as a model: the weights that its reader will see, with scales that can be trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from smolexport.calibration.trainer import AffineBlocks, Trained
from smolexport.conversion.plan import Entry
from smolexport.errors import CalibrationError
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.spec import Tensor
from smolexport.quant import RowFormat
from smolexport.quant.affine_view import factors_of, has_grid, with_factors

CHUNK = 1 << 20  # elements that a thread encodes at a time


def has_scales(entry: Entry) -> bool:
    """Whether `entry` has trainable scales: a calibrated matrix in a format with a grid."""
    return entry.encoder is not None and has_grid(entry.canonical)


class Student(Mapping[str, AffineBlocks]):
    """The entries of one output, quantized; maps the source names of matrices with trainable scales to their factors.

    Matrices are unpacked on access: all of them at once would be the model in float32.

    Attributes:
        rows: encoded rows of these matrices, by source name, in their canonical formats.
        forms: these formats.
        columns: elements of a row, by source name, of all tensors.
    """

    def __init__(self, entries: Sequence[Entry], source: Checkpoint, threads: int) -> None:
        """Encodes every matrix with trainable scales, on `threads` threads."""
        if source.spec.rearranged:  # a trainer finds matrices by the checkpoint's names
            raise CalibrationError(f"distil: the checkpoint rearranges {source.spec.rearranged[0]}; use gptq")
        self._source = source
        self._entries = {e.tensor: e for e in entries if e.tensor is not None}
        trained = {tensor: entry for tensor, entry in self._entries.items() if has_scales(entry)}
        with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
            self.rows = {tensor.stored_name: self._encoded(entry, tensor, pool) for tensor, entry in trained.items()}
        self.forms: dict[str, RowFormat] = {tensor.stored_name: entry.canonical for tensor, entry in trained.items()}
        self.columns = {tensor.stored_name: tensor.shape[-1] for tensor in self._entries}

    def _encoded(self, entry: Entry, tensor: Tensor, pool: ThreadPoolExecutor) -> NDArray[np.uint8]:
        stored = self._source.stored[tensor]
        step = max(1, CHUNK // tensor.shape[1])

        def encode(start: int) -> NDArray[np.uint8]:
            return entry.encode(stored.read_rows(start, min(start + step, tensor.shape[0])), start)

        return np.concatenate(list(pool.map(encode, range(0, tensor.shape[0], step))))

    def __getitem__(self, name: str) -> AffineBlocks:
        return factors_of(self.forms[name], self.rows[name], self.columns[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def frozen(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """(source name, values) of every other tensor, as a reader of the output will see it."""
        for tensor, entry in self._entries.items():
            if tensor.stored_name not in self.rows:
                encoded = entry.encode(self._source.stored[tensor].read_rows())
                yield tensor.stored_name, entry.canonical.decode(encoded, tensor.shape[-1]).reshape(tensor.shape)

    def decoded(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """(source name, values) of all tensors as a reader of the output will see them."""
        yield from self.frozen()
        for name, rows in self.rows.items():
            yield name, self.forms[name].decode(rows, self.columns[name])

    def with_factors(self, name: str, factors: Trained) -> NDArray[np.uint8]:
        """The encoded rows of the matrix `name` with other factors, rounded as they are stored."""
        return with_factors(self.forms[name], self.rows[name], self.columns[name], factors.d, factors.m)

    def stored(self, name: str, factors: Trained) -> Trained:
        """`factors` as a reader of the output will see them."""
        found = factors_of(self.forms[name], self.with_factors(name, factors), self.columns[name])
        return Trained(found.d, found.m)

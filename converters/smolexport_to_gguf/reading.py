"""The weights of a GGUF file in the checkpoint's own terms: roles instead of names, rows in their first order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smolexport.conversion.plan import InterleaveHeads
from smolexport.errors import FileFormatError
from smolexport.model.spec import Role, Tensor
from smolexport.text import label, show
from smolexport_to_gguf import architectures
from smolexport_to_gguf.container import GgufFile, TensorInfo, read_gguf

MAX_LAYERS = 4096


@dataclass(frozen=True)
class StoredRows:
    """One tensor of a file; `reorder` is what the export did to its rows."""

    path: Path
    info: TensorInfo
    reorder: InterleaveHeads | None

    def read_rows(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) as [rows, columns], decoded; a vector is one row.

        Raises:
            FileFormatError: the file vanished or became shorter.
        """
        if len(self.info.shape) == 1:
            return self._vector()
        stop = self.info.shape[0] if stop is None else stop
        if self.reorder is None:
            return self._decode(start, stop)
        unit = self.reorder.head_dim  # rows move within their head
        first = start // unit * unit
        heads = self.reorder.undo(self._decode(first, -(-stop // unit) * unit))
        return heads[start - first : stop - first]

    def _vector(self) -> NDArray[np.float32]:
        row = self._decode(0, 1)
        return row if self.reorder is None else self.reorder.undo(row.T).T

    def _decode(self, start: int, stop: int) -> NDArray[np.float32]:
        columns = self.info.shape[-1]
        width = self.info.format.row_bytes(columns)
        try:
            raw = np.fromfile(self.path, np.uint8, (stop - start) * width, offset=self.info.offset + start * width)
        except OSError as error:
            raise FileFormatError(f"{self.path}: {error.strerror or error}") from error
        if raw.size != (stop - start) * width:
            raise FileFormatError(f"{self.path}: ends inside the tensor {label(self.info.name)}")
        return self.info.format.decode(raw.reshape(-1, width), columns)


def weights(path: Path) -> dict[Tensor, StoredRows]:
    """The tensors of the file `path` that come from a checkpoint.

    Raises:
        FileFormatError: damaged, of an unknown architecture, or with tensors that have no role in it.
    """
    file = read_gguf(path)
    a, known = file.text("general.architecture"), ", ".join({row.name: None for row in architectures.ROWS.values()})
    row = next((r for r in architectures.ROWS.values() if r.name == a), None)
    if a is None:
        raise FileFormatError(f"{path}: general.architecture is missing or no text; known: {known}")
    if row is None:
        raise FileFormatError(f"{path}: architecture {show(a)} is not known; known: {known}")
    reorder = InterleaveHeads(_head_dim(file, row.name)) if row.pairs else None
    found, left = {}, set(file.tensors) - {"rope_freqs.weight"}
    for tensor in _candidates(file, row.name):
        info = file.tensors.get(architectures.output_name(tensor))
        if info is None:
            continue
        moved = reorder if tensor.role in (Role.Q, Role.K) else None
        if len(info.shape) > 2 or (moved and info.shape[0] % moved.head_dim):
            raise FileFormatError(
                f"{path}: tensor {label(info.name)} has shape {list(info.shape)}; the file is damaged"
            )
        found[replace(tensor, shape=info.shape)] = StoredRows(path, info, moved)
        left.discard(info.name)
    if left:
        raise FileFormatError(f"{path}: tensor {label(min(left))} has no role in the architecture {row.name}")
    return found


def _head_dim(file: GgufFile, a: str) -> int:
    """Rows of a head, from the first key that is there; raises FileFormatError unless they are whole pairs."""
    for key in (f"{a}.attention.key_length", f"{a}.rope.dimension_count"):
        if key in file.metadata:
            return _pairs(file, file.whole(key), key)
    heads, width = file.whole(f"{a}.attention.head_count"), file.whole(f"{a}.embedding_length")
    if heads is None or width is None or heads < 1 or width % heads:
        raise FileFormatError(f"{file.path}: does not tell the length of a head; the file is damaged")
    return _pairs(file, width // heads, f"{a}.embedding_length / {a}.attention.head_count")


def _pairs(file: GgufFile, length: int | None, source: str) -> int:
    if length is None or length < 2 or length % 2:
        found = "no whole number" if length is None else f"{length}, no whole pairs"
        raise FileFormatError(f"{file.path}: the length of a head ({source}) is {found}; the file is damaged")
    return length


def _candidates(file: GgufFile, a: str) -> list[Tensor]:
    """Every tensor that could be there, without its shape."""
    count = file.whole(f"{a}.block_count")
    if count is None or not 0 <= count <= MAX_LAYERS:
        found = "missing or no whole number" if count is None else f"{count}"
        raise FileFormatError(f"{file.path}: {a}.block_count is {found}; the file is damaged")
    layered = {role: "{}" in name for role, name in architectures.NAMES.items()}
    places: list[tuple[Role, tuple[int, ...]]] = [(role, ()) for role in Role if not layered[role]]
    places += [(role, (layer,)) for layer in range(count) for role in Role if layered[role]]
    return [Tensor(role, index, part, ()) for role, index in places for part in ("weight", "bias")]

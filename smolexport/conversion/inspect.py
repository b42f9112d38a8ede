"""What an exported file contains, in words that every format shares, and its tensors, decoded as they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolexport.conversion.plan import InterleaveHeads
from smolexport.errors import FileFormatError
from smolexport.quant import RowFormat
from smolexport.text import label

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a file: [out, in] shape, block format, bytes, first byte in the file."""

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    offset: int


@dataclass(frozen=True)
class FileInfo:
    """An exported file or folder.

    Attributes:
        path: the file or folder.
        format: e.g. `gguf`.
        architecture: the format's name of the architecture.
        name: what people call the model.
        scheme: the quantization scheme as recorded in the file.
        bytes: size on disk.
        metadata: key -> value, arrays as they are.
        tensors: in file order.
    """

    path: Path
    format: str
    architecture: str
    name: str
    scheme: str
    bytes: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorRow, ...]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(prod(row.shape) for row in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors, without metadata."""
        return 8 * sum(row.nbytes for row in self.tensors) / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class StoredArray:
    """One array of a file; `dtype` is its safetensors name, `offset` its first byte.

    A `transposed` array has the rows of its matrix as columns.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    transposed: bool = False

    def read(self, skip: int, count: int) -> NDArray[np.uint8]:
        """`count` bytes from byte `skip` on; raises FileFormatError if the file vanished or became shorter."""
        import numpy as np

        try:
            raw = np.fromfile(self.path, np.uint8, count, offset=self.offset + skip)
        except OSError as error:
            raise FileFormatError(f"{self.path}: {error.strerror or error}") from error
        if raw.size != count:
            raise FileFormatError(f"{self.path}: ends inside the array {label(self.name)}")
        return raw

    def read_columns(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Columns [start, stop) of a matrix of bytes."""
        import numpy as np

        columns, pitch = self.shape
        found = np.empty((columns, stop - start), np.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                for number, run in enumerate(found):
                    file.seek(self.offset + number * pitch + start)
                    if file.readinto(run.data) != run.size:
                        raise FileFormatError(f"{self.path}: ends inside the array {label(self.name)}")
        except OSError as error:
            raise FileFormatError(f"{self.path}: {error.strerror or error}") from error
        return found


@dataclass(frozen=True)
class StoredRows:
    """One tensor: the arrays of its parts, and the format that they make up together.

    It begins at row `first` of the arrays, or at that element of a vector; `transform` reordered its rows.
    """

    form: RowFormat
    shape: tuple[int, ...]
    parts: tuple[StoredArray, ...]
    first: int = 0
    transform: InterleaveHeads | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return prod(self.shape[:-1]) * sum(part.nbytes for part in self.form.parts(self.shape[-1]))

    def read_rows(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) as [rows, columns], decoded; a vector is one row.  Raises FileFormatError."""
        stop = prod(self.shape[:-1]) if stop is None else stop
        if self.transform is None:
            return self._decoded(start, stop)
        if len(self.shape) == 1:
            return self.transform.undo(self._decoded(start, stop).T).T
        unit = self.transform.head_dim  # rows move within their head
        begin = start // unit * unit
        heads = self.transform.undo(self._decoded(begin, -(-stop // unit) * unit))
        return heads[start - begin : stop - begin]

    def _decoded(self, start: int, stop: int) -> NDArray[np.float32]:
        import numpy as np

        columns = self.shape[-1]
        pieces = []
        for part, planned in zip(self.parts, self.form.parts(columns), strict=True):
            if part.transposed:
                pieces.append(part.read_columns(self.first + start, self.first + stop).T)
            else:
                width = planned.nbytes
                skip = self.first * (width if len(self.shape) > 1 else width // columns)
                pieces.append(part.read(skip + start * width, (stop - start) * width).reshape(-1, width))
        rows = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
        return self.form.decode(np.ascontiguousarray(rows), columns)


def tensor_rows(stored: Mapping[str, StoredRows], others: Iterable[StoredArray]) -> tuple[TensorRow, ...]:
    """What `FileInfo` lists: tensors, and the arrays that belong to none."""
    return (
        *(TensorRow(name, s.shape, s.form.name, s.nbytes, s.parts[0].offset) for name, s in stored.items()),
        *(TensorRow(a.name, a.shape, a.dtype.lower(), a.nbytes, a.offset) for a in others),
    )


def common_format(stored: Mapping[str, StoredRows]) -> str:
    """Name of the format of most weights, for a file that records no scheme."""
    sizes: Counter[str] = Counter()
    for rows in stored.values():
        sizes[rows.form.name] += prod(rows.shape)
    return sizes.most_common(1)[0][0] if sizes else "?"

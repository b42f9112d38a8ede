"""The weights in an exported file as the checkpoint had them, read back, and their fingerprint.

Whatever a format renamed, reordered or packed is undone, so that files of different formats can be compared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from smolexport.errors import FileFormatError
from smolexport.model.spec import ModelSpec, Role, Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK = 1 << 20  # elements
DIGITS = 32


class ReadableTensor(Protocol):
    """A tensor whose rows can be read in the checkpoint's order."""

    def read_rows(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) as [rows, columns] floats; a vector is one row."""
        ...


Weights = Mapping[Tensor, ReadableTensor]


def canonical(tensors: Mapping[Tensor, Any]) -> list[Tensor]:
    """`tensors` in the order of the forward pass."""
    roles = {role: number for number, role in enumerate(Role)}

    def place(tensor: Tensor) -> tuple[int, tuple[int, ...], int, str]:
        stage = 0 if tensor.role is Role.EMBED else 1 if tensor.layer is not None else 2
        return stage, tensor.index, roles[tensor.role], tensor.part

    return sorted(tensors, key=place)


def read_back(weights: Weights, path: Path, spec: ModelSpec) -> Iterator[tuple[Tensor, NDArray[np.float32]]]:
    """Every tensor of `spec` from the file `path`, decoded, in the checkpoint's own order of rows, one at a time.

    Raises:
        FileFormatError: the tensors are not those of `spec`.
    """
    import numpy as np

    shapes = {tensor.key: tensor.shape for tensor in weights}
    for tensor in spec.tensors():
        shape = shapes.get(tensor.key)
        if shape != tensor.shape:
            found = "is missing" if shape is None else f"has shape {list(shape)}"
            raise FileFormatError(f"{path}: tensor {tensor.name} {found}; the model asks for {list(tensor.shape)}")
        whole = np.empty((tensor.rows, tensor.columns), np.float32)
        for start, rows in _chunks(tensor, weights[tensor]):
            whole[start : start + len(rows)] = rows
        yield tensor, whole.reshape(tensor.shape)


def as_stored(spec: ModelSpec, tensors: Iterable[tuple[Tensor, NDArray[Any]]]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Name and array of each of `tensors` as the checkpoint stores them: the inverse of reading it.

    Fused tensors are buffered until they are complete.
    """
    import numpy as np

    missing = Counter(tensor.stored_name for tensor in spec.tensors())
    held: dict[str, dict[Tensor, NDArray[Any]]] = {}
    for tensor, values in tensors:
        name, how = tensor.stored_name, tensor.source
        held.setdefault(name, {})[tensor] = values - np.float32(how.added) if how.added else values
        missing[name] -= 1
        if missing[name] == 0:
            parts = [*held.pop(name).values()]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            yield name, whole.T if how.transposed else whole


def _chunks(tensor: Tensor, stored: ReadableTensor) -> Iterator[tuple[int, NDArray[Any]]]:
    """(first row, rows) of all rows in chunks: decoding at once would take several times the memory."""
    step = max(1, CHUNK // tensor.columns)
    for start in range(0, tensor.rows, step):
        yield start, stored.read_rows(start, min(start + step, tensor.rows))


def fingerprint(weights: Weights, threads: int = 1, progress: Callable[[int], None] | None = None) -> str:
    """A hash that is equal for two exports if and only if all their decoded weights are.

    SHA-256, cut to 32 hexadecimal digits, over the SHA-256 of each tensor in `canonical` order: its name, shape, and
    its values as little-endian float32 in the checkpoint's order of rows, -0 counted as 0.  `progress` is called with
    the number of weights of each chunk.
    """
    total = hashlib.sha256()
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="hash") as pool:
        order = canonical(weights)
        for digest in pool.map(lambda tensor: _digest(tensor, weights[tensor], progress), order):
            total.update(digest)
    return total.hexdigest()[:DIGITS]


def _digest(tensor: Tensor, stored: ReadableTensor, progress: Callable[[int], None] | None) -> bytes:
    found = hashlib.sha256(f"{tensor.name} {list(tensor.shape)}\n".encode())
    for _, rows in _chunks(tensor, stored):
        values = rows.astype("<f4")
        values += 0  # -0 + 0 is 0
        found.update(values.reshape(-1).data)
        if progress:
            progress(values.size)
    return found.digest()

"""The weights of an MLX folder in the checkpoint's own terms, whoever made the folder.

Notation: g = group size, b = bits; a quantized module's weight is [out, in * b / 32] words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.checkpoint import read_json
from smolexport.errors import CheckpointError, FileFormatError, UsageError
from smolexport.quant import FORMATS, AffineFormat, MicroFormat, RowFormat
from smolexport.spec import Role, Tensor
from smolexport_to_mlx.container import StoredArray, read_arrays
from smolexport_to_mlx.schemes import DTYPES, MICRO

__all__ = ["Folder", "StoredRows", "read_folder", "weights"]

CONFIG = "config.json"
FLOATS: Mapping[str, str] = {dtype: name for name, dtype in DTYPES.items()}
ROLES: Mapping[str, Role] = {role.value: role for role in Role}


@dataclass(frozen=True)
class StoredRows:
    """One tensor of a folder: the arrays of its parts, and the format that they make up together."""

    form: RowFormat
    shape: tuple[int, ...]
    parts: tuple[StoredArray, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def read_rows(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) as [rows, columns], decoded; a vector is one row.

        Raises:
            FileFormatError: a file vanished or became shorter.
        """
        rows, columns = self.shape if len(self.shape) == 2 else (1, self.shape[0])
        stop = rows if stop is None else stop
        widths = [part.nbytes for part in self.form.parts(columns)]
        data = np.empty((stop - start, sum(widths)), np.uint8)
        first = 0
        for part, width in zip(self.parts, widths, strict=True):
            data[:, first : first + width] = _read(part, start * width, (stop - start) * width).reshape(-1, width)
            first += width
        return self.form.decode(data, columns)


def _read(part: StoredArray, skip: int, count: int) -> NDArray[np.uint8]:
    try:
        raw = np.fromfile(part.path, np.uint8, count, offset=part.offset + skip)
    except OSError as error:
        raise FileFormatError(f"{part.path}: {error.strerror or error}") from error
    if raw.size != count:
        raise FileFormatError(f"{part.path}: ends inside the array {part.name}")
    return raw


@dataclass(frozen=True)
class Folder:
    """A folder's headers: config.json, the strings of the first weight file, and every tensor."""

    path: Path
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    tensors: Mapping[Tensor, StoredRows]


def weights(path: Path) -> Mapping[Tensor, StoredRows]:
    """The tensors of the folder `path`; raises FileFormatError when it is damaged or holds something unknown."""
    return read_folder(path).tensors


def read_folder(path: Path) -> Folder:
    """Read config.json and the headers of `path`; no weight is read.

    Raises:
        FileFormatError: damaged, or an array that is no part of a known module.
    """
    try:
        config = read_json(path / CONFIG, "the folder is no MLX folder")
    except CheckpointError as error:
        raise FileFormatError(str(error)) from error
    arrays, metadata = read_arrays(path)
    tensors: dict[Tensor, StoredRows] = {}
    left = dict(arrays)
    for name in arrays:
        if name.endswith((".scales", ".biases")):
            continue
        module, _, part = name.rpartition(".")
        array = left.pop(name)
        scales, biases = left.pop(f"{module}.scales", None), left.pop(f"{module}.biases", None)
        stored = _stored(array, scales, biases, _setting(config, module)) if part == "weight" else _plain(array)
        if part != "weight" and (scales or biases):
            raise FileFormatError(f"{array.path}: {module} has scales but no weight")
        tensors[_tensor(array, part, stored.shape)] = stored
    if left:
        name = min(left)
        raise FileFormatError(f"{left[name].path}: the array {name} belongs to no module")
    return Folder(path, config, metadata, tensors)


def _tensor(array: StoredArray, part: str, shape: tuple[int, ...]) -> Tensor:
    module = array.name.removesuffix(f".{part}")
    words = module.split(".")
    layer = next((int(word) for word in words if word.isdecimal() and len(word) < 6), None)
    role = ROLES.get(module if layer is None else ".".join("{}" if word == str(layer) else word for word in words))
    if role is None or part not in ("weight", "bias"):
        raise FileFormatError(f"{array.path}: the array {array.name} is no part of a known module")
    return Tensor(role, layer, part, shape)


def _plain(array: StoredArray) -> StoredRows:
    if array.dtype not in FLOATS or not 1 <= len(array.shape) <= 2 or not all(array.shape):
        raise FileFormatError(f"{array.path}: the array {array.name} is {array.dtype} {list(array.shape)}, not floats")
    return StoredRows(FORMATS[FLOATS[array.dtype]], array.shape, (array,))


def _stored(
    array: StoredArray, scales: StoredArray | None, biases: StoredArray | None, setting: Mapping[str, Any]
) -> StoredRows:
    if scales is None and biases is None:
        return _plain(array)
    if scales is None or any(len(a.shape) != 2 or not all(a.shape) for a in (array, scales)):
        raise FileFormatError(f"{array.path}: {array.name} and its scales do not make up a quantized matrix")
    form = _format(array, scales, setting)
    parts = tuple(a for a in (array, scales, biases) if a is not None)
    shape = (array.shape[0], scales.shape[1] * form.block)
    for found, due in zip(parts, form.parts(shape[1]), strict=False):
        if (found.dtype, found.shape) != (due.dtype, (shape[0], due.columns)) or len(parts) != len(
            form.parts(shape[1])
        ):
            raise FileFormatError(
                f"{found.path}: the array {found.name} is {found.dtype} {list(found.shape)}, "
                f"{form.name} asks for {due.dtype} {[shape[0], due.columns]}"
            )
    return StoredRows(form, shape, parts)


def _setting(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What config.json says of a module: its own entry, else the default."""
    table = config.get("quantization", config.get("quantization_config"))
    if not isinstance(table, dict):
        return {}
    own = table.get(module)
    return own if isinstance(own, dict) else table


def _format(array: StoredArray, scales: StoredArray, setting: Mapping[str, Any]) -> RowFormat:
    """The format that `setting` names; raises FileFormatError for none or an unknown one."""
    mode, bits, group = setting.get("mode", "affine"), setting.get("bits"), setting.get("group_size")
    dtype = next((d for d in DTYPES.values() if d == scales.dtype), None)
    if mode == "affine" and dtype and isinstance(bits, int) and isinstance(group, int):
        try:
            return AffineFormat(bits, group, dtype)
        except UsageError as error:
            raise FileFormatError(f"{array.path}: {array.name}: {error}") from error
    micro = next((m for m, due in MICRO.items() if m == mode and due == (bits, group)), None)
    if micro:
        return MicroFormat(micro, "F32")
    raise FileFormatError(
        f"{array.path}: config.json gives {array.name} mode {mode!r} with {bits!r} bits and groups of {group!r}, "
        "which is not read"
    )

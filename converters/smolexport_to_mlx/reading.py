"""The weights of an MLX folder in the checkpoint's own terms, whoever made the folder.

Notation: g = group size, b = bits; a quantized module's weight is [out, in * b / 32] words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import CheckpointError, ConfigError, FileFormatError, UsageError
from smolexport.model.arch import load_spec
from smolexport.model.checkpoint import read_json
from smolexport.model.spec import Tensor
from smolexport.quant import FORMATS, RowFormat
from smolexport.quant.planar import MODES, AffineFormat, MicroFormat
from smolexport.text import label, show
from smolexport_to_mlx.container import StoredArray, read_arrays
from smolexport_to_mlx.schemes import DTYPES

CONFIG = "config.json"


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
        """Rows [start, stop) as [rows, columns], decoded; a vector is one row, further axes count as rows.

        Raises:
            FileFormatError: a file vanished or became shorter.
        """
        rows, columns = prod(self.shape[:-1]), self.shape[-1]
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
        raise FileFormatError(f"{part.path}: ends inside the array {label(part.name)}")
    return raw


@dataclass(frozen=True)
class Folder:
    """A folder's headers, of whatever architecture.

    Attributes:
        path: the folder.
        config: config.json.
        metadata: the strings of the first weight file.
        stored: array name -> the tensor that it makes up, with the scales and biases of its module if it is packed.
        others: arrays that are neither floats nor part of a quantized module.
    """

    path: Path
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    stored: Mapping[str, StoredRows]
    others: tuple[StoredArray, ...]


def weights(path: Path) -> Mapping[Tensor, StoredRows]:
    """The tensors of the folder `path`, in the terms of a checkpoint.

    Raises:
        FileFormatError: damaged, or an array that is not part of a module known here.
    """
    folder = read_folder(path)
    try:
        known = {tensor.stored_name: tensor for tensor in load_spec(folder.config, strict=False).tensors()}
    except ConfigError as error:
        raise FileFormatError(f"{path}: {error}") from error
    tensors = {_tensor(name, stored, known): stored for name, stored in folder.stored.items()}
    for array in folder.others:
        raise FileFormatError(
            f"{array.path}: the array {label(array.name)}, {array.dtype} {list(array.shape)}, "
            "belongs to no known module"
        )
    return tensors


def read_folder(path: Path) -> Folder:
    """Read config.json and the headers of `path`; no weight is read.

    Raises:
        FileFormatError: damaged, or a quantized module whose arrays do not fit together.
    """
    try:
        config = read_json(path / CONFIG, "the folder is not an MLX folder")
    except CheckpointError as error:
        raise FileFormatError(str(error)) from error
    arrays, metadata = read_arrays(path)
    packed = {name[:-7] for name in arrays if name.endswith(".scales") and f"{name[:-7]}.weight" in arrays}
    parts = {f"{module}.{part}" for module in packed for part in ("scales", "biases")}
    stored, others = dict[str, StoredRows](), list[StoredArray]()
    for name, array in arrays.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and module in packed:
            found = (array, arrays[f"{module}.scales"], arrays.get(f"{module}.biases"))
            stored[name] = _packed(*found, _setting(config, module))
        elif array.dtype in DTYPES.values() and array.shape and all(array.shape) and name not in parts:
            stored[name] = StoredRows(FORMATS[array.dtype.lower()], array.shape, (array,))
        elif name not in parts:
            others.append(array)
    return Folder(path, config, metadata, stored, tuple(others))


def _tensor(name: str, stored: StoredRows, known: Mapping[str, Tensor]) -> Tensor:
    if name not in known or len(stored.shape) > 2:
        raise FileFormatError(
            f"{stored.parts[0].path}: the array {label(name)} {list(stored.shape)} is not part of a known module"
        )
    return replace(known[name], shape=stored.shape)


def _packed(
    array: StoredArray, scales: StoredArray, biases: StoredArray | None, setting: Mapping[str, Any]
) -> StoredRows:
    """A quantized matrix, or a stack of them."""
    if any(len(a.shape) < 2 or not all(a.shape) for a in (array, scales)):
        raise FileFormatError(f"{array.path}: {label(array.name)} and its scales do not make up a quantized matrix")
    form = _format(array, scales, setting)
    parts = tuple(a for a in (array, scales, biases) if a is not None)
    shape = (*array.shape[:-1], scales.shape[-1] * form.block)
    wanted = form.parts(shape[-1])
    for found, due in zip(parts, wanted, strict=False):
        if (found.dtype, found.shape) != (due.dtype, (*shape[:-1], due.columns)) or len(parts) != len(wanted):
            raise FileFormatError(
                f"{found.path}: the array {label(found.name)} is {found.dtype} {list(found.shape)}, "
                f"{form.name} asks for {due.dtype} {[*shape[:-1], due.columns]}"
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
            raise FileFormatError(f"{array.path}: {label(array.name)}: {error}") from error
    micro = next((m for m, due in MODES.items() if m == mode and due == (bits, group)), None)
    if micro:
        return MicroFormat(micro, "F32")
    raise FileFormatError(
        f"{array.path}: config.json gives {label(array.name)} mode {show(mode)} with {show(bits)} bits and groups of "
        f"{show(group)}, which is not read"
    )

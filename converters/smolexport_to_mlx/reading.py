"""What an MLX folder contains, whoever made it: a description, and weights in the checkpoint's own terms.

Notation: g = group size, b = bits; a quantized module's weight is [out, in * b / 32] words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolexport.conversion.folder_files import as_format_errors, is_own_folder
from smolexport.conversion.inspect import FileInfo, StoredArray, StoredRows, common_format, tensor_rows
from smolexport.conversion.source_model import NAME_KEY, SCHEME_KEY
from smolexport.errors import ConfigError, FileFormatError, UsageError
from smolexport.model.arch import load_spec
from smolexport.model.checkpoint import read_json
from smolexport.model.spec import Tensor
from smolexport.quant import FORMATS, RowFormat
from smolexport.quant.planar import MODES, AffineFormat, MicroFormat
from smolexport.text import label, show
from smolexport_to_mlx.container import INDEX, read_arrays, read_header, read_headers
from smolexport_to_mlx.schemes import DTYPES, SCHEMES

CONFIG = "config.json"
MARK = ("format", "mlx")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
OURS = frozenset({CONFIG, "README.md", INDEX})


@dataclass(frozen=True)
class Folder:
    """A folder's headers, of any architecture.

    `metadata` are the strings of the first weight file; `stored` maps the name of each array of weights to its tensor,
    with scales and biases if it is packed; `others` are neither floats nor part of a quantized module.
    """

    path: Path
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    stored: Mapping[str, StoredRows]
    others: tuple[StoredArray, ...]


def recognises(path: Path) -> bool:
    """Whether `path` is a folder with weight files of MLX."""
    try:
        if not (path / "config.json").is_file():
            return False
        first = min(path.glob("model*.safetensors"), default=None)
        return first is not None and read_header(first)[0].get(MARK[0]) == MARK[1]
    except (OSError, FileFormatError):
        return False


def replaceable(path: Path) -> bool:
    """Whether `path` is a folder that smolexport made, and that holds nothing else."""
    return is_own_folder(
        path,
        lambda name: name in OURS or WEIGHTS.fullmatch(name) is not None,
        lambda folder: [metadata for metadata, _ in read_headers(folder).values()],
    )


def describe(path: Path) -> FileInfo:
    """Read the headers in the folder `path`, of any architecture; raises FileFormatError.

    Arrays that are not part of a known kind of weight are listed as they are.
    """
    folder = read_folder(path)
    recorded = folder.metadata.get(SCHEME_KEY)
    return FileInfo(
        path=path,
        format="mlx",
        architecture=str(folder.config.get("model_type", "?")),
        name=folder.metadata.get(NAME_KEY, path.resolve().name),
        scheme=recorded if recorded and recorded in SCHEMES else common_format(folder.stored),
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        metadata={**folder.metadata, **{f"config.{key}": value for key, value in folder.config.items()}},
        tensors=tensor_rows(folder.stored, folder.others),
    )


def weights(path: Path) -> Mapping[Tensor, StoredRows]:
    """The tensors of the folder `path`, in the terms of a checkpoint; raises FileFormatError."""
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
    """Read config.json and the headers of `path`; no weight is read.  Raises FileFormatError."""
    with as_format_errors(path):
        config = read_json(path / CONFIG, "the folder is not an MLX folder")
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
        raise FileFormatError(f"{array.path}: {label(array.name)} and its scales are not a quantized matrix")
    form = _format(array, scales, setting)
    parts = tuple(a for a in (array, scales, biases) if a is not None)
    shape = (*array.shape[:-1], scales.shape[-1] * form.block)
    planned = form.parts(shape[-1])
    for found, due in zip(parts, planned, strict=False):
        if (found.dtype, found.shape) != (due.dtype, (*shape[:-1], due.columns)) or len(parts) != len(planned):
            raise FileFormatError(
                f"{found.path}: the array {label(found.name)} is {found.dtype} {list(found.shape)}, "
                f"{form.name} needs {due.dtype} {[*shape[:-1], due.columns]}"
            )
    return StoredRows(form, shape, parts)


def _setting(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The entry of a module in config.json, else the default."""
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
        f"{show(group)}, which is not supported"
    )

"""The weights of an MLX folder: safetensors files, their index, and the position of every array in them.

Facts: mlx-lm 0.32.2 `utils.py` (shards of at most 5 GiB, names, index); the safetensors format (an 8-byte length, a
JSON header, data without gaps).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from smolexport.conversion.folder_files import json_bytes
from smolexport.conversion.inspect import StoredArray
from smolexport.conversion.plan import ByteRange, Entry, OutputFile
from smolexport.errors import FileFormatError
from smolexport.files import open_regular
from smolexport.quant.formats import SIZES
from smolexport.text import first_line, label

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 << 30
MAX_HEADER = 16 << 20  # bytes; some 65,000 arrays, where large models have some thousand
ALIGNMENT = 8


@dataclass(frozen=True)
class Array:
    """One array of the output: name, safetensors dtype and shape, and the part of an entry's rows that it holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: ByteRange

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.part.width * (self.shape[0] if len(self.shape) == 2 else 1)


def weight_files(entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[OutputFile, ...]:
    """The safetensors files of `entries` and their index, which Swift and the hub read even for one file.

    A new file starts where the next array would pass `SHARD_BYTES`; each header has the strings of `metadata`.
    """
    shards: list[list[Array]] = [[]]
    used = 0
    for array in _arrays(entries):
        if shards[-1] and used + array.nbytes > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(array)
        used += array.nbytes
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    named = list(zip(names, shards, strict=True))
    index = {
        "metadata": {
            "total_size": sum(array.nbytes for shard in shards for array in shard),
            "total_parameters": sum(entry.weights for entry in entries),  # before packing
        },
        "weight_map": dict(
            sorted((array.name, name) for name, shard in zip(names, shards, strict=True) for array in shard)
        ),
    }
    files = (_shard(name, shard, metadata) for name, shard in named)
    return *files, OutputFile(INDEX, json_bytes(index, 4))


def _arrays(entries: Sequence[Entry]) -> Iterator[Array]:
    for entry in entries:
        module, first = entry.name.removesuffix(".weight"), 0
        parts = entry.format.parts(entry.shape[-1])
        for part in parts:
            name = entry.name if len(parts) == 1 else f"{module}.{part.suffix}"
            shape = (entry.shape[0], part.columns) if entry.is_matrix else (part.columns,)
            yield Array(name, part.dtype, shape, ByteRange(entry.name, 0, part.nbytes, first))
            first += part.nbytes


def _shard(name: str, arrays: list[Array], metadata: Mapping[str, str]) -> OutputFile:
    """Wide types first, so that every array is aligned to its type; then by name, so that equal inputs agree."""
    # Half a surrogate pair, as a file name that is not UTF-8 becomes in Python, is legal JSON that few readers take.
    strings = {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()}
    header: dict[str, object] = {"__metadata__": strings}
    ranges, total = [], 0
    for array in sorted(arrays, key=lambda array: (-SIZES[array.dtype], array.name)):
        ranges.append(replace(array.part, offset=total))
        span = [total, total := total + array.nbytes]
        header[array.name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    text = len(text).to_bytes(8, "little") + text
    placed = tuple(replace(part, offset=len(text) + part.offset) for part in ranges)
    return OutputFile(name, text, placed, len(text) + total)


def read_arrays(folder: Path) -> tuple[dict[str, StoredArray], dict[str, str]]:
    """Every array of the weight files in `folder`, and the first one's metadata; raises FileFormatError."""
    found: dict[str, StoredArray] = {}
    headers = read_headers(folder)
    for path, (_, arrays) in headers.items():
        for array in arrays:
            if array.name in found:
                raise FileFormatError(f"{path}: the array {label(array.name)} is in {found[array.name].path.name} too")
            found[array.name] = array
    return found, next(iter(headers.values()))[0]


def read_headers(folder: Path) -> dict[Path, tuple[dict[str, str], list[StoredArray]]]:
    """Metadata and arrays of each model*.safetensors in `folder`, as mlx-lm loads them; raises FileFormatError."""
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise FileFormatError(f"{folder}: no model*.safetensors in it; the folder is not an MLX folder")
    return {path: read_header(path) for path in paths}


def read_header(path: Path) -> tuple[dict[str, str], list[StoredArray]]:
    """Metadata and arrays of one file; safetensors checks lengths, offsets and overlaps.  Raises FileFormatError."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise FileFormatError(f"{path}: has a header of {length:,} bytes, more than any model's; it is damaged")
            with safe_open(path, framework="np") as opened:
                metadata = opened.metadata() or {}
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: is damaged or not a safetensors file ({first_line(error)})") from error
    header.pop("__metadata__", None)
    arrays = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        arrays.append(StoredArray(name, path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start))
    return metadata, arrays

"""The weights of an MLX folder: safetensors files, their index, and where every array lies in them.

Facts: mlx-lm 0.32.2 `utils.py` (shards of at most 5 GiB, names, index); the safetensors format (an 8-byte length, a
JSON header, data without gaps).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from smolexport.conversion.plan import Entry
from smolexport.conversion.writer import ByteRange
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
    """One array of the output.

    Attributes:
        name: in the file.
        dtype: safetensors name.
        shape: as readers see it.
        entry: name of the planned tensor that it is a part of.
        first: where the part begins in an encoded row, in bytes.
        width: bytes of the part in a row.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    entry: str
    first: int
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.width * (self.shape[0] if len(self.shape) == 2 else 1)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its arrays with the first byte of each, counted from the start of the file."""

    name: str
    header: bytes
    arrays: tuple[tuple[Array, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(array.nbytes for array, _ in self.arrays)


def arrays_of(entries: Iterable[Entry]) -> Iterator[Array]:
    """The arrays that the encoded rows of `entries` are made of."""
    for entry in entries:
        module, first = entry.name.removesuffix(".weight"), 0
        parts = entry.format.parts(entry.shape[-1])
        for part in parts:
            name = entry.name if len(parts) == 1 else f"{module}.{part.suffix}"
            shape = (entry.shape[0], part.columns) if entry.is_matrix else (part.columns,)
            yield Array(name, part.dtype, shape, entry.name, first, part.nbytes)
            first += part.nbytes


def shards_of(arrays: Iterable[Array], metadata: Mapping[str, str], limit: int | None = None) -> list[Shard]:
    """The files that hold `arrays`: a new one starts where the next array would pass the limit.

    Args:
        arrays: in the order of the forward pass.
        metadata: the header's strings.
        limit: bytes of data in a file; None = mlx-lm's.
    """
    limit = SHARD_BYTES if limit is None else limit
    groups: list[list[Array]] = [[]]
    used = 0
    for array in arrays:
        if groups[-1] and used + array.nbytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(array)
        used += array.nbytes
    count = len(groups)
    names = [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for i in range(count)
    ]
    return [_shard(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, arrays: list[Array], metadata: Mapping[str, str]) -> Shard:
    """Wide types first, so that every array is aligned to its type; then by name, so that equal inputs agree."""
    ordered = sorted(arrays, key=lambda array: (-SIZES[array.dtype], array.name))
    # Half a surrogate pair, as a file name that is not UTF-8 becomes in Python, is legal JSON that few readers take.
    strings = {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()}
    entries: dict[str, object] = {"__metadata__": strings}
    starts, total = [], 0
    for array in ordered:
        starts.append(total)
        total += array.nbytes
        entries[array.name] = {
            "dtype": array.dtype, "shape": list(array.shape), "data_offsets": [starts[-1], total],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return Shard(name, header, tuple((a, len(header) + start) for a, start in zip(ordered, starts, strict=True)))


def places_of(shards: list[Shard]) -> dict[str, list[ByteRange]]:
    """Where the parts of each planned tensor go."""
    places: dict[str, list[ByteRange]] = {}
    for number, shard in enumerate(shards):
        for array, offset in shard.arrays:
            places.setdefault(array.entry, []).append(ByteRange(offset, array.width, array.first, number))
    return places


def index_json(shards: list[Shard], weights: int) -> bytes:
    """The index, which Swift and the hub read even for one file; `weights` counts parameters before packing."""
    where = {array.name: shard.name for shard in shards for array, _ in shard.arrays}
    total = sum(array.nbytes for shard in shards for array, _ in shard.arrays)
    index = {
        "metadata": {"total_size": total, "total_parameters": weights},
        "weight_map": dict(sorted(where.items())),
    }
    return (json.dumps(index, indent=4) + "\n").encode()


@dataclass(frozen=True)
class StoredArray:
    """One array of a finished folder: where it lies and what it is."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_arrays(folder: Path) -> tuple[dict[str, StoredArray], dict[str, str]]:
    """Every array of every model*.safetensors in `folder`, and the metadata of the first file.

    Raises:
        FileFormatError: no such file, a damaged one, or an array that stands in two.
    """
    found: dict[str, StoredArray] = {}
    metadata: dict[str, str] = {}
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise FileFormatError(f"{folder}: no model*.safetensors in it; the folder is not an MLX folder")
    for path in paths:
        strings, arrays = read_header(path)
        metadata = metadata or strings
        for array in arrays:
            if array.name in found:
                raise FileFormatError(
                    f"{path}: the array {label(array.name)} stands in {found[array.name].path.name} too"
                )
            found[array.name] = array
    return found, metadata


def read_header(path: Path) -> tuple[dict[str, str], list[StoredArray]]:
    """Metadata and arrays of one file; safetensors itself checks lengths, offsets and overlaps.

    Raises:
        FileFormatError: damaged, or not safetensors.
    """
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
        raise FileFormatError(f"{path}: is damaged or no safetensors file ({first_line(error)})") from error
    header.pop("__metadata__", None)
    arrays = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        arrays.append(StoredArray(name, path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start))
    return metadata, arrays

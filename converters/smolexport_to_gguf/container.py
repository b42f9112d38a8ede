"""The GGUF container, version 3: header, key/values, tensor infos, padded data.

Writing fixes every offset before the first tensor, so that data can be streamed after it.  Reading checks every
length and offset against the file before it is used, since the file may come from anywhere.
Source: the format's public specification (ggml `docs/gguf.md`) and the rules of llama.cpp's loader.
"""

from __future__ import annotations

import struct
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from os import SEEK_CUR
from pathlib import Path
from typing import Any, BinaryIO, overload

from smolexport.errors import FileFormatError
from smolexport.files import open_regular
from smolexport.quant import FORMATS, BlockFormat
from smolexport.text import label, show

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MAX_DIMS = 4
# Far more than any model has (some dozens of keys, 262,144 tokens with 600,000 merges, some thousand tensors): a file
# of a few megabytes could otherwise cause work for hours.
MAX_KEYS = MAX_TENSORS = 1 << 16
MAX_VALUES = 1 << 22  # in all arrays of the metadata
CLOCK_GRAIN = 100_000_000  # ns; a file that is changed twice within it may keep its time
BLOCK = 1 << 20  # bytes read at once
MAX_NAME = (1 << 16) - 1  # bytes, what the specification allows a key
# (key, kind, value); kinds: u32 i32 f32 bool string … and the same in brackets for arrays.
Metadata = Sequence[tuple[str, str, Any]]

CODES = {
    "u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "string": 8, "u64": 10, "i64": 11,
    "f64": 12,
}  # fmt: skip
KINDS = {code: kind for kind, code in CODES.items()}
ARRAY = 9
NUMBERS = dict(zip("u8 i8 u16 i16 u32 i32 f32 bool u64 i64 f64".split(), "BbHhIif?Qqd", strict=True))
STRUCTS = {kind: struct.Struct(f"<{code}") for kind, code in NUMBERS.items()}
BY_GGML_TYPE = {f.ggml_type: f for f in FORMATS.values()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: name, [out, in] shape, format and the first byte of its data in the file."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.format.size(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """An opened file: its metadata and tensors; data stay on disk."""

    path: Path
    metadata: dict[str, tuple[str, Any]]
    tensors: dict[str, TensorInfo]

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a metadata key."""
        return self.metadata[key][1] if key in self.metadata else default

    def text(self, key: str) -> str | None:
        """Value of a metadata key that should be text; None if it is missing or of another kind."""
        value = self.get(key)
        return value if isinstance(value, str) else None

    def whole(self, key: str) -> int | None:
        """Value of a metadata key that should be a whole number; None if it is missing or of another kind."""
        value = self.get(key)
        return value if type(value) is int else None


class LazyTexts(Sequence[str]):
    """Texts that are made when they are read: a vocabulary has hundreds of thousands."""

    def __init__(self, count: int, text: Callable[[int], str]) -> None:
        """`text` makes the text of each index."""
        self._indices, self._text = range(count), text

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        found = self._indices[index]
        return self._text(found) if isinstance(found, int) else list(map(self._text, found))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self[:] == list(other)

    __hash__ = None  # type: ignore[assignment]

    def tolist(self) -> list[str]:
        """All of them, under the name that NumPy's arrays have for it."""
        return self[:]


def padding(size: int) -> int:
    """Zero bytes after `size` bytes up to the alignment."""
    return -size % ALIGNMENT


def header_bytes(metadata: Metadata, tensors: Iterable[tuple[str, tuple[int, ...], BlockFormat]]) -> bytearray:
    """All before the first tensor's data, padded; `tensors` are (name, [out, in] shape, format) in file order."""
    rows = list(tensors)
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(rows), len(metadata)))
    for key, kind, value in metadata:
        _add_string(out, key)
        _add_value(out, kind, value)
    offset = 0
    for name, shape, form in rows:
        _add_string(out, name)
        out += struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", form.ggml_type, offset)
        size = form.size(shape)
        offset += size + padding(size)
    out += bytes(padding(len(out)))
    return out


def _add_string(out: bytearray, text: str) -> None:
    raw = text.encode("utf-8", "replace")
    out += STRUCTS["u64"].pack(len(raw))
    out += raw


def _add_value(out: bytearray, kind: str, value: Any) -> None:
    item = kind.strip("[]")
    if item != kind:
        out += struct.pack("<IIQ", ARRAY, CODES[item], len(value))
    else:
        out += struct.pack("<I", CODES[item])
    values = value if item != kind else (value,)
    if item == "string":
        for text in values:
            _add_string(out, text)
    else:
        out += struct.pack(f"<{len(values)}{NUMBERS[item]}", *values)


class Reader:
    """Reads forward through a file of known size; every length is checked before anything is allocated."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.left = path.stat().st_size
        self._values = 0  # of arrays, so far

    def fail(self, what: str) -> FileFormatError:
        """The error to raise when `what` is wrong."""
        return FileFormatError(f"{self.path}: {label(what)}; the file is damaged or incomplete")

    def take(self, count: int) -> bytes:
        """The next `count` bytes; raises FileFormatError if there are fewer."""
        if count > self.left:
            raise self.fail(f"ends early, {count:,} bytes are promised where {self.left:,} are left")
        self.left -= count
        data = self.file.read(count)
        if len(data) < count:
            raise self.fail("was cut while it was read")
        return data

    def number(self, kind: str) -> Any:
        """The next number of the given kind."""
        form = STRUCTS[kind]
        return form.unpack(self.take(form.size))[0]

    def string(self) -> str:
        """The next text, after its length."""
        return self.take(self.number("u64")).decode("utf-8", "replace")

    def name(self, what: str) -> str:
        """The next text, which names `what`."""
        size = self.number("u64")
        if size > MAX_NAME:
            raise self.fail(f"{what} has a name of {size:,} bytes")
        return self.take(size).decode("utf-8", "replace")

    def strings(self, count: int) -> LazyTexts:
        """The next `count` texts; in one loop over blocks of the file, since a vocabulary has hundreds of thousands."""
        data, ends, at, held = bytearray(), array("Q"), 0, 0
        size_at, append = STRUCTS["u64"].unpack_from, ends.append

        def reach(end: int) -> int:
            """Read at least the first `end` bytes into `data`; returns its length."""
            if end > self.left:
                raise self.fail(f"ends early, inside an array of {count:,} strings")
            data.extend(self.file.read(max(end - len(data), BLOCK)))
            if end > len(data):
                raise self.fail("was cut while it was read")
            return len(data)

        for _ in range(count):
            at += 8
            if at > held:
                held = reach(at)
            at += size_at(data, at - 8)[0]
            if at > held:
                held = reach(at)
            append(at)
        self.file.seek(at - len(data), SEEK_CUR)
        self.left -= at
        del data[at:]
        return LazyTexts(count, lambda i: data[(ends[i - 1] if i else 0) + 8 : ends[i]].decode("utf-8", "replace"))

    def value(self) -> tuple[str, Any]:
        """The next metadata value and its kind."""
        code = self.number("u32")
        if code != ARRAY:
            kind = self.kind(code)
            return kind, self.string() if kind == "string" else self.number(kind)
        item, count = self.kind(self.number("u32")), self.number("u64")
        self._values += count
        if self._values > MAX_VALUES:
            raise self.fail(f"arrays of the metadata promise {self._values:,} values, more than any model has")
        if item == "string":
            return "[string]", self.strings(count)
        return f"[{item}]", memoryview(self.take(count * STRUCTS[item].size)).cast(NUMBERS[item])  # type: ignore[call-overload]

    def kind(self, code: int) -> str:
        """The kind of `code`; raises FileFormatError for an unknown one."""
        if code not in KINDS:
            raise self.fail(f"metadata value type {code} is unknown")
        return KINDS[code]


def read_gguf(path: Path) -> GgufFile:
    """Read header, metadata and tensor infos, cached unless the file has just been written; raises FileFormatError."""
    try:
        stat = path.stat()
        fresh = time.time_ns() - stat.st_mtime_ns < CLOCK_GRAIN
        read = _opened.__wrapped__ if fresh else _opened
        return read(path, (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        raise FileFormatError(f"{path}: {error.strerror}") from error


@lru_cache(maxsize=1)
def _opened(path: Path, _stamp: tuple[int, ...]) -> GgufFile:
    with open_regular(path) as file:
        return _read(Reader(file, path))


def _read(reader: Reader) -> GgufFile:
    size = reader.left
    if size < 24 or reader.take(4) != MAGIC:
        raise FileFormatError(f"{reader.path}: is not a GGUF file")
    version = reader.number("u32")
    if version != VERSION:
        raise FileFormatError(f"{reader.path}: GGUF version {version}; only version {VERSION} is supported")
    tensor_count, key_count = reader.number("u64"), reader.number("u64")
    for count, most, what in ((tensor_count, MAX_TENSORS, "tensors"), (key_count, MAX_KEYS, "keys")):
        if count > most:
            raise reader.fail(f"it promises {count:,} {what}, more than any model has")
    metadata: dict[str, tuple[str, Any]] = {}
    for _ in range(key_count):
        key = reader.name("a key")
        if key in metadata:
            raise reader.fail(f"the key {label(key)} appears twice")
        metadata[key] = reader.value()
    alignment = _alignment(reader, metadata)
    infos = [_tensor_info(reader) for _ in range(tensor_count)]
    used = size - reader.left
    base = used + -used % alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, form, offset in infos:
        info = TensorInfo(name, shape, form, base + offset)
        if name in tensors:
            raise reader.fail(f"the tensor {label(name)} appears twice")
        if offset % alignment:
            raise reader.fail(
                f"the tensor {label(name)} starts at {offset}, not a multiple of the alignment {alignment}"
            )
        if info.offset + info.nbytes > size:
            raise reader.fail(f"the tensor {label(name)} reaches beyond the end")
        tensors[name] = info
    _check_apart(reader, tensors)
    return GgufFile(reader.path, metadata, tensors)


def _check_apart(reader: Reader, tensors: dict[str, TensorInfo]) -> None:
    """Refuse tensors that overlap, as llama.cpp does: a small file could otherwise cause unlimited work."""
    for first, second in pairwise(sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes))):
        if first.offset + first.nbytes > second.offset:
            raise reader.fail(f"the tensors {label(first.name)} and {label(second.name)} share their bytes")


def _alignment(reader: Reader, metadata: dict[str, tuple[str, Any]]) -> int:
    kind, value = metadata.get("general.alignment", ("u32", ALIGNMENT))
    if kind != "u32" or value < 1 or value & (value - 1):
        raise reader.fail(f"general.alignment is {show(value)} ({kind}), not a power of two")
    return int(value)


def _tensor_info(reader: Reader) -> tuple[str, tuple[int, ...], BlockFormat, int]:
    name, dims = reader.name("a tensor"), reader.number("u32")
    if not 1 <= dims <= MAX_DIMS:
        raise reader.fail(f"the tensor {label(name)} has {dims} dimensions")
    shape = tuple(reversed([reader.number("u64") for _ in range(dims)]))
    code, offset = reader.number("u32"), reader.number("u64")
    if code not in BY_GGML_TYPE:
        known = ", ".join(FORMATS)
        raise FileFormatError(
            f"{reader.path}: tensor {label(name)} has ggml type {code}, which is not supported; known: {known}"
        )
    if not BY_GGML_TYPE[code].fits(shape[-1]):
        raise reader.fail(f"the tensor {label(name)} has rows of {shape[-1]}, not a multiple of its block")
    return name, shape, BY_GGML_TYPE[code], offset

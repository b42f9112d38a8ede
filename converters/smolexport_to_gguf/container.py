"""The GGUF container, version 3: header, key/values, tensor infos, padded data.

Writing fixes every offset before the first tensor, so that data can be streamed behind it.  Reading checks every
length and offset against the file before it is used, since the file may come from anywhere.
Source: the format's public specification (ggml `docs/gguf.md`) and the rules of llama.cpp's loader.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smolexport.errors import FileFormatError
from smolexport.quant import FORMATS, BlockFormat
from smolexport.regular import open_regular

__all__ = ["ALIGNMENT", "GgufFile", "Metadata", "Reader", "TensorInfo", "header_bytes", "padding", "read_gguf"]

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MAX_DIMS = 4
LONGEST = 160  # characters of what is wrong
# (key, kind, value); kinds: u32 i32 f32 bool string … and the same in brackets for arrays.
Metadata = Sequence[tuple[str, str, Any]]

CODES = {
    "u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "string": 8, "u64": 10, "i64": 11,
    "f64": 12,
}  # fmt: skip
KINDS = {code: kind for kind, code in CODES.items()}
ARRAY = 9
NUMPY = {
    "u8": "<u1", "i8": "<i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4", "f32": "<f4", "bool": "?",
    "u64": "<u8", "i64": "<i8", "f64": "<f8",
}  # fmt: skip
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
        """Value of a metadata key that should be text; None where it is missing or of another kind."""
        value = self.get(key)
        return value if isinstance(value, str) else None

    def whole(self, key: str) -> int | None:
        """Value of a metadata key that should be a whole number; None where it is missing or of another kind."""
        value = self.get(key)
        return value if type(value) is int else None


def padding(size: int) -> int:
    """Zero bytes needed behind `size` bytes to reach the alignment."""
    return -size % ALIGNMENT


def header_bytes(metadata: Metadata, tensors: Iterable[tuple[str, tuple[int, ...], BlockFormat]]) -> bytes:
    """Everything before the first tensor's data, padded to the alignment.

    Args:
        metadata: (key, kind, value) in file order.
        tensors: (name, [out, in] shape, format) in file order.
    """
    rows = list(tensors)
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(rows), len(metadata)))
    for key, kind, value in metadata:
        out += _string(key) + _value(kind, value)
    offset = 0
    for name, shape, form in rows:
        out += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", form.ggml_type, offset)
        size = form.size(shape)
        offset += size + padding(size)
    return bytes(out + bytes(padding(len(out))))


def _words(text: str) -> str:
    """A stranger's names on one short line."""
    return "".join(c if c.isprintable() else "?" for c in text[:LONGEST])


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: str, value: Any) -> bytes:
    if not kind.startswith("["):
        code = struct.pack("<I", CODES[kind])
        return code + (_string(value) if kind == "string" else np.array(value, NUMPY[kind]).tobytes())
    item = kind[1:-1]
    head = struct.pack("<IIQ", ARRAY, CODES[item], len(value))
    return head + (b"".join(map(_string, value)) if item == "string" else np.asarray(value, NUMPY[item]).tobytes())


class Reader:
    """Reads forward through a file of known size; every length is checked before anything is allocated."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.left = path.stat().st_size

    def fail(self, what: str) -> FileFormatError:
        """The error to raise when `what` is wrong."""
        return FileFormatError(f"{self.path}: {_words(what)}; the file is damaged or incomplete")

    def take(self, count: int) -> bytes:
        """The next `count` bytes; raises FileFormatError when there are fewer."""
        if count > self.left:
            raise self.fail(f"ends early, {count:,} bytes are promised where {self.left:,} are left")
        self.left -= count
        data = self.file.read(count)
        if len(data) < count:
            raise self.fail("was cut while it was read")
        return data

    def number(self, kind: str) -> Any:
        """The next number of the given kind."""
        dtype = np.dtype(NUMPY[kind])
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def string(self) -> str:
        """The next text, behind its length."""
        return self.take(self.number("u64")).decode("utf-8", "replace")

    def value(self) -> tuple[str, Any]:
        """The next metadata value and its kind."""
        code = self.number("u32")
        if code != ARRAY:
            kind = self.kind(code)
            return kind, self.string() if kind == "string" else self.number(kind)
        item, count = self.kind(self.number("u32")), self.number("u64")
        if item == "string":
            if count * 8 > self.left:
                raise self.fail(f"an array promises {count:,} strings")
            return "[string]", [self.string() for _ in range(count)]
        dtype = np.dtype(NUMPY[item])
        return f"[{item}]", np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def kind(self, code: int) -> str:
        """The kind that `code` stands for; raises FileFormatError for an unknown one."""
        if code not in KINDS:
            raise self.fail(f"metadata value type {code} is unknown")
        return KINDS[code]


def read_gguf(path: Path) -> GgufFile:
    """Read header, metadata and tensor infos.

    Raises:
        FileFormatError: not a GGUF file, another version, damaged, or a tensor type outside the known formats.
    """
    try:
        with open_regular(path) as file:
            return _read(Reader(file, path))
    except OSError as error:
        raise FileFormatError(f"{path}: {error.strerror}") from error


def _read(reader: Reader) -> GgufFile:
    size = reader.left
    if size < 24 or reader.take(4) != MAGIC:
        raise FileFormatError(f"{reader.path}: is not a GGUF file")
    version = reader.number("u32")
    if version != VERSION:
        raise FileFormatError(f"{reader.path}: GGUF version {version}; only version {VERSION} is read")
    tensor_count, key_count = reader.number("u64"), reader.number("u64")
    metadata: dict[str, tuple[str, Any]] = {}
    for _ in range(key_count):
        key = reader.string()
        if key in metadata:
            raise reader.fail(f"the key {key} stands twice")
        metadata[key] = reader.value()
    alignment = _alignment(reader, metadata)
    infos = [_tensor_info(reader) for _ in range(tensor_count)]
    used = size - reader.left
    base = used + -used % alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, form, offset in infos:
        info = TensorInfo(name, shape, form, base + offset)
        if name in tensors:
            raise reader.fail(f"the tensor {name} stands twice")
        if offset % alignment:
            raise reader.fail(f"the tensor {name} starts at {offset}, no multiple of the alignment {alignment}")
        if info.offset + info.nbytes > size:
            raise reader.fail(f"the tensor {name} reaches beyond the end")
        tensors[name] = info
    return GgufFile(reader.path, metadata, tensors)


def _alignment(reader: Reader, metadata: dict[str, tuple[str, Any]]) -> int:
    kind, value = metadata.get("general.alignment", ("u32", ALIGNMENT))
    if kind != "u32" or value < 1 or value & (value - 1):
        raise reader.fail(f"general.alignment is {value!r} ({kind}), not a power of two")
    return int(value)


def _tensor_info(reader: Reader) -> tuple[str, tuple[int, ...], BlockFormat, int]:
    name, dims = reader.string(), reader.number("u32")
    if not 1 <= dims <= MAX_DIMS:
        raise reader.fail(f"the tensor {name} has {dims} dimensions")
    shape = tuple(reversed([reader.number("u64") for _ in range(dims)]))
    code, offset = reader.number("u32"), reader.number("u64")
    if code not in BY_GGML_TYPE:
        known = ", ".join(FORMATS)
        what = f"tensor {_words(name)} has ggml type {code}"
        raise FileFormatError(f"{reader.path}: {what}, which is not read; known: {known}")
    if not BY_GGML_TYPE[code].fits(shape[-1]):
        raise reader.fail(f"the tensor {name} has rows of {shape[-1]}, no multiple of its block")
    return name, shape, BY_GGML_TYPE[code], offset

"""Plan, then write: every output tensor and file, decided before a weight is read.

A converter turns a `SourceModel` and a scheme into a `Plan`; `render()` is what `--dry-run` prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from smolexport.errors import CheckpointError
from smolexport.model.spec import Tensor
from smolexport.quant import RowFormat
from smolexport.text import printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Encoded rows by the format that their values were rounded through, their own, and the id of what shaped them.
EncodedBy: TypeAlias = "dict[tuple[RowFormat | None, RowFormat, int], NDArray[np.uint8]]"


@dataclass(frozen=True)
class InterleaveHeads:
    """Reorder the rows of each head from halves (i, i + d/2) to adjacent pairs (2i, 2i + 1), d = `head_dim`.

    Whole rows move, so it commutes with any row-wise quantization.
    """

    head_dim: int

    def __call__(self, rows: NDArray[Any]) -> NDArray[Any]:
        """`rows` [heads * d, columns], whole heads; returns a new array of the same shape."""
        heads = rows.reshape(-1, 2, self.head_dim // 2, rows.shape[1])
        return heads.swapaxes(1, 2).reshape(rows.shape)

    def undo(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The inverse of calling it."""
        heads = rows.reshape(-1, self.head_dim // 2, 2, rows.shape[1])
        return heads.swapaxes(1, 2).reshape(rows.shape)


class RowEncoder(Protocol):
    """Encodes the rows of one tensor where a format's own rounding is not good enough."""

    def encode(self, form: RowFormat, rows: NDArray[Any], start: int) -> NDArray[np.uint8]:
        """Encode the rows [n, columns] of the tensor from row `start` on to [n, row_bytes] of `form`."""
        ...


@dataclass(frozen=True)
class Entry:
    """One tensor of the output.

    Attributes:
        name: name in the output.
        format: block format of the stored rows.
        shape: [out, in] or [n].
        tensor: its source; None for a generated tensor.
        requested: format that the scheme asks for if the shape does not allow it; else None.
        transform: reordering of rows on the way.
        rounded_through: format that values are rounded to first; None = none.
        values: content of a generated tensor.
        importance: [columns] weight of an error in each column for the format's search; None = the format's default.
        encoder: encodes the rows in place of the format; None = the format does, by `importance`.
    """

    name: str
    format: RowFormat
    shape: tuple[int, ...]
    tensor: Tensor | None = None
    requested: RowFormat | None = None
    transform: InterleaveHeads | None = None
    rounded_through: RowFormat | None = None
    values: tuple[float, ...] = ()
    importance: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    encoder: RowEncoder | None = field(default=None, repr=False, compare=False)

    @property
    def canonical(self) -> RowFormat:
        """The format that rows are encoded in; where formats share codes, `format.repack` rearranges its rows."""
        return self.format.canonical or self.format

    def encode(self, rows: NDArray[Any], start: int = 0, known: EncodedBy | None = None) -> NDArray[np.uint8]:
        """Rows [n, columns] of the tensor, from row `start` on, in the canonical format: [n, row_bytes].

        Rounds through `rounded_through` first.  `known` keeps results for other entries with the same rows.

        Raises:
            CalibrationError: the encoder lacks a statistic.
        """
        known = {} if known is None else known
        if self.rounded_through is not None:
            through = (None, self.rounded_through, id(None))
            if through not in known:
                known[through] = self.rounded_through.encode(rows)
            rows = self.rounded_through.decode(known[through], rows.shape[1])
        key = (self.rounded_through, self.canonical, id(self.encoder or self.importance))
        if key not in known:
            known[key] = (
                self.encoder.encode(self.canonical, rows, start)
                if self.encoder
                else self.canonical.encode(rows, self.importance)
            )
        return known[key]

    def store(self, rows: NDArray[Any], start: int = 0, known: EncodedBy | None = None) -> NDArray[np.uint8]:
        """Like `encode`, as the output stores the rows: repacked and reordered."""
        if self.canonical is self.format:
            stored = self.encode(rows, start, known)
        elif known is None and self.encoder is None and self.rounded_through is None:
            stored = self.format.encode(rows, self.importance)  # encodes and repacks in one step
        else:
            stored = self.format.repack(self.encode(rows, start, known), rows.shape[1])
        if self.transform is None:
            return stored
        if self.is_matrix:
            return self.transform(stored)
        return self.transform(stored.reshape(self.shape[0], -1)).reshape(1, -1)  # the elements of a vector

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows; a vector counts as a single one."""
        return len(self.shape) > 1

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded tensor."""
        return self.format.size(self.shape)

    @property
    def weights(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class ByteRange:
    """Where a part of the encoded rows of `entry` is stored: rows of `width` bytes from byte `offset` of a file on.

    The part is the bytes [first, first + width) of each encoded row; formats that keep codes and scales apart have a
    range for each.  With a `pitch` the part is transposed: byte j of row i is at offset + j * pitch + i.
    """

    entry: str
    offset: int
    width: int
    first: int = 0
    pitch: int | None = None


@dataclass(frozen=True)
class OutputFile:
    """One file of the output.

    Attributes:
        name: path inside the output folder; empty if the output is this one file.
        content: its bytes, or the file that is copied; the header of a file with encoded rows.
        ranges: where encoded rows are stored; empty for a small file.
        size: bytes, where they are not those of `content`.
        tables: (offset, function that yields the bytes) of arrays that no entry holds.
    """

    name: str
    content: bytes | Path = field(repr=False)
    ranges: tuple[ByteRange, ...] = field(default=(), repr=False)
    size: int | None = None
    tables: tuple[tuple[int, Callable[[], Iterator[NDArray[np.uint8]]]], ...] = field(default=(), repr=False)

    @property
    def nbytes(self) -> int:
        """Its size."""
        return len(self.read()) if self.size is None else self.size

    def read(self) -> bytes:
        """Its content; raises CheckpointError if the copied file has vanished."""
        if isinstance(self.content, bytes):
            return self.content
        try:
            return self.content.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{self.content}: {error.strerror or error}; it existed when the export began"
            ) from error


@dataclass(frozen=True)
class Plan:
    """Everything that a converter will write.

    Attributes:
        target: format of the output, e.g. `gguf`.
        architecture: the target's name of the architecture.
        scheme: name of the quantization scheme.
        entries: tensors in file order.
        metadata: (key, kind, value) in file order, in the target's own vocabulary.
        notes: what a person should know before it is written.
        files: all files, those with encoded rows first.
    """

    target: str
    architecture: str
    scheme: str
    entries: tuple[Entry, ...]
    metadata: tuple[tuple[str, str, Any], ...] = field(repr=False, default=())
    notes: tuple[str, ...] = ()
    files: tuple[OutputFile, ...] = field(repr=False, default=())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without metadata and padding."""
        return sum(e.nbytes for e in self.entries)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(e.weights for e in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Effective bits per weight over all tensors."""
        return 8 * self.nbytes / self.weights

    @property
    def fallbacks(self) -> tuple[Entry, ...]:
        """Entries whose shape does not allow the format that the scheme asks for."""
        return tuple(e for e in self.entries if e.requested is not None)

    def shares(self) -> dict[str, tuple[int, int]]:
        """Per format name: (tensors, bytes), largest first."""
        rows: dict[str, tuple[int, int]] = {}
        for e in self.entries:
            count, size = rows.get(e.format.name, (0, 0))
            rows[e.format.name] = (count + 1, size + e.nbytes)
        return dict(sorted(rows.items(), key=lambda item: -item[1][1]))

    def fallback_lines(self) -> list[str]:
        """One line per kind of fallback: how many tensors, which format in place of which, and why."""
        groups: dict[tuple[RowFormat, RowFormat, int], int] = {}
        for e in self.fallbacks:
            if e.requested is not None:
                key = (e.requested, e.format, e.shape[-1])
                groups[key] = groups.get(key, 0) + 1
        return [
            f"{count} tensor{'s' * (count > 1)}: row length {columns} is not a multiple of "
            f"{_unmet(requested, columns)}; using {got.name} instead of {requested.name}"
            for (requested, got, columns), count in groups.items()
        ]

    def summary(self) -> str:
        """The first lines of every export: size, bits per weight, share per format, fallbacks, notes."""
        lines = [
            f"{self.target} {self.scheme} ({self.architecture}): {len(self.entries)} tensors, "
            f"{self.weights:,} weights, {self.nbytes / 1e6:.1f} MB, {self.bits_per_weight:.2f} bits per weight"
        ]
        wide = max(6, *(len(e.format.name) for e in self.entries))
        lines += [
            f"  {name:<{wide}} {count:>4} tensors {size / 1e6:>10.2f} MB {size / self.nbytes:>6.1%}"
            for name, (count, size) in self.shares().items()
        ]
        lines += [f"note: {printable(line)}" for line in (*self.fallback_lines(), *self.notes)]
        return "\n".join(lines)

    def render(self) -> str:
        """The whole plan as text: summary, metadata (long values shortened), a line per tensor."""
        lines = [self.summary(), "", "metadata"]
        lines += [f"  {printable(key):<48} {kind:<8} {_shown(value)}" for key, kind, value in self.metadata]
        lines += ["", "tensors"]
        wide, long = max(5, *(len(e.format.name) for e in self.entries)), max(28, *(len(e.name) for e in self.entries))
        for e in self.entries:
            why = f"  (instead of {e.requested.name})" if e.requested else ""
            shape = " x ".join(map(str, e.shape))
            lines.append(f"  {e.name:<{long}} {shape:>16}  {e.format.name:<{wide}} {e.nbytes:>12,} bytes{why}")
        if small := [file for file in self.files if not file.ranges]:
            lines += ["", "small files", *(f"  {printable(f.name):<40} {f.nbytes:>12,} bytes" for f in small)]
        return "\n".join(lines)


def _unmet(requested: RowFormat, columns: int) -> int:
    """The block length that a row is not a multiple of: the requested format's, or 32 if not even of that."""
    smallest = min(32, requested.block)
    if columns % smallest:
        return smallest
    return requested.block if columns % requested.block else 32


def _shown(value: Any) -> str:
    if isinstance(value, str):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, (Sequence, memoryview)) or hasattr(value, "dtype"):
        return f"[{len(value)} values]"
    if isinstance(value, dict) and len(str(value)) > 100:
        return f"{{{len(value)} keys}}"
    return f"{value:.9g}" if isinstance(value, float) else printable(str(value))

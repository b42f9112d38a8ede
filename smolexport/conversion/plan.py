"""Plan, then write: every output tensor with its format and bytes, decided before a weight is read.

A converter turns a `ModelSpec` and a scheme into a `Plan`; `render()` is what `--dry-run` prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import CheckpointError
from smolexport.model.spec import Tensor
from smolexport.quant import RowFormat
from smolexport.text import printable

# Encoded rows by the format that their values were rounded through, their own, and the id of what shaped them.
Made = dict[tuple[RowFormat | None, RowFormat, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class InterleaveHeads:
    """Reorder the rows of each head from halves (i, i + d/2) to adjacent pairs (2i, 2i + 1), d = `head_dim`.

    Whole rows move, so it commutes with any row-wise quantization.
    """

    head_dim: int

    def __call__(self, rows: NDArray[Any]) -> NDArray[Any]:
        """`rows` [heads * d, columns], whole heads; returns a new array of the same shape."""
        heads = rows.reshape(-1, 2, self.head_dim // 2, rows.shape[1])
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)

    def undo(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The inverse of calling it."""
        heads = rows.reshape(-1, self.head_dim // 2, 2, rows.shape[1])
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


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
        format: block format that it gets.
        shape: [out, in] or [n].
        tensor: where it comes from; None for a generated tensor.
        wanted: format that the scheme asked for when the shape did not allow it.
        transform: reordering of rows on the way.
        via: values are rounded to this format first; None = they are not.
        values: content of a generated tensor.
        importance: [columns] how much an error in each column matters to the format's search; None = its own choice.
        encoder: encodes the rows in the format's place; None = the format does, by `importance`.
    """

    name: str
    format: RowFormat
    shape: tuple[int, ...]
    tensor: Tensor | None = None
    wanted: RowFormat | None = None
    transform: InterleaveHeads | None = None
    via: RowFormat | None = None
    values: tuple[float, ...] = ()
    importance: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    encoder: RowEncoder | None = field(default=None, repr=False, compare=False)

    @property
    def canonical(self) -> RowFormat:
        """The format that rows are encoded in; where formats share codes, `format.repack` rearranges its rows."""
        return self.format.canonical or self.format

    def encode(self, rows: NDArray[Any], start: int = 0, made: Made | None = None) -> NDArray[np.uint8]:
        """Rows [n, columns] of the tensor, from row `start` on, in the canonical format: [n, row_bytes].

        Rounds through `via` first.  `made` keeps results for other entries with the same rows.

        Raises:
            CalibrationError: the encoder lacks a statistic.
        """
        made = {} if made is None else made
        if self.via is not None:
            through = (None, self.via, id(None))
            if through not in made:
                made[through] = self.via.encode(rows)
            rows = self.via.decode(made[through], rows.shape[1])
        key = (self.via, self.canonical, id(self.encoder or self.importance))
        if key not in made:
            made[key] = (
                self.encoder.encode(self.canonical, rows, start)
                if self.encoder
                else self.canonical.encode(rows, self.importance)
            )
        return made[key]

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
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class Companion:
    """A small file beside the weights of an output that is a folder.

    Attributes:
        name: path inside the folder.
        content: its bytes, or the file that is copied byte for byte.
    """

    name: str
    content: bytes | Path = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Its size; raises CheckpointError when the file vanished."""
        if isinstance(self.content, bytes):
            return len(self.content)
        with self._readable(self.content):
            return self.content.stat().st_size

    def read(self) -> bytes:
        """Its content; raises CheckpointError when the file vanished."""
        if isinstance(self.content, bytes):
            return self.content
        with self._readable(self.content):
            return self.content.read_bytes()

    @contextmanager
    def _readable(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}; it was there when the export began") from error


@dataclass(frozen=True)
class Plan:
    """Everything that a converter is about to write.

    Attributes:
        target: format of the file, e.g. `gguf`.
        architecture: the target's name of the architecture.
        scheme: name of the quantization scheme.
        entries: tensors in file order.
        metadata: (key, kind, value) in file order, in the target's own vocabulary.
        notes: what a person should know before it is written.
        companions: small files beside the weights.
    """

    target: str
    architecture: str
    scheme: str
    entries: tuple[Entry, ...]
    metadata: tuple[tuple[str, str, Any], ...] = field(repr=False, default=())
    notes: tuple[str, ...] = ()
    companions: tuple[Companion, ...] = field(repr=False, default=())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without metadata and padding."""
        return sum(e.nbytes for e in self.entries)

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
        """Entries that could not get the format that the scheme asked for."""
        return tuple(e for e in self.entries if e.wanted is not None)

    def shares(self) -> dict[str, tuple[int, int]]:
        """Per format name: (tensors, bytes), largest first."""
        rows: dict[str, tuple[int, int]] = {}
        for e in self.entries:
            count, size = rows.get(e.format.name, (0, 0))
            rows[e.format.name] = (count + 1, size + e.nbytes)
        return dict(sorted(rows.items(), key=lambda item: -item[1][1]))

    def fallback_lines(self) -> list[str]:
        """One line per kind of fall-back: how many tensors, from what to what, and why."""
        groups: dict[tuple[RowFormat, RowFormat, int], int] = {}
        for e in self.fallbacks:
            if e.wanted is not None:
                key = (e.wanted, e.format, e.shape[-1])
                groups[key] = groups.get(key, 0) + 1
        return [
            f"{count} tensor{'s' * (count > 1)}: rows of {columns} are not a multiple of {_unmet(wanted, columns)}: "
            f"{got.name} instead of {wanted.name}"
            for (wanted, got, columns), count in groups.items()
        ]

    def summary(self) -> str:
        """The first lines of every export: size, bits per weight, share per format, fall-backs, notes."""
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
            why = f"  (instead of {e.wanted.name})" if e.wanted else ""
            shape = " x ".join(map(str, e.shape))
            lines.append(f"  {e.name:<{long}} {shape:>16}  {e.format.name:<{wide}} {e.nbytes:>12,} bytes{why}")
        if self.companions:
            lines += [
                "",
                "beside the weights",
                *(f"  {printable(c.name):<40} {c.nbytes:>12,} bytes" for c in self.companions),
            ]
        return "\n".join(lines)


def _unmet(wanted: RowFormat, columns: int) -> int:
    """The block that a row does not fill: the wanted format's, or 32 when it does not even fill that."""
    smallest = min(32, wanted.block)
    if columns % smallest:
        return smallest
    return wanted.block if columns % wanted.block else 32


def _shown(value: Any) -> str:
    if isinstance(value, str):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, (Sequence, np.ndarray)):
        return f"[{len(value)} values]"
    if isinstance(value, dict) and len(str(value)) > 100:
        return f"{{{len(value)} keys}}"
    return f"{value:.9g}" if isinstance(value, float) else printable(str(value))

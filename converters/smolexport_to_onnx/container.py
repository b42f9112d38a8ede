"""The weights of a graph: one file of external data beside it, and where every array lies in it.

Rows of several tensors may make up one matrix, one after another: queries, keys and values, gates and ups.  Codes with
one scale a row stand upright, [columns, rows], as MatMulInteger wants them.  Large arrays begin at a page, so that a
runtime can map them into memory.

Notation: d = rotary dimensions, p = positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from smolexport.conversion.plan import Entry
from smolexport.conversion.writer import ByteRange
from smolexport.model.rope import Rope
from smolexport.model.spec import NAMES, Role, Tensor
from smolexport.quant import RowFormat
from smolexport.quant.formats import SIZES
from smolexport.quant.planar import ChannelFormat
from smolexport_to_onnx.schemes import Dtype, packing_of

QKV, GATE_UP = "model.layers.{}.self_attn.qkv_proj", "model.layers.{}.mlp.gate_up_proj"
PACKED: Mapping[Role, str] = {Role.Q: QKV, Role.K: QKV, Role.V: QKV, Role.GATE: GATE_UP, Role.UP: GATE_UP}
PAGE, LINE = 4096, 64
# Element types under the names of safetensors -> TensorProto.DataType.
DTYPES: Mapping[str, int] = {"F32": 1, "U8": 2, "I8": 3, "I32": 6, "I64": 7, "BOOL": 9, "F16": 10, "BF16": 16}
KEEP = "num_logits_to_keep"  # the input that says how many last rows of logits to make
POSITIONS_AT_ONCE = 4096


@dataclass(frozen=True)
class Module:
    """Tensors that the graph uses as one matrix [rows, columns], or as one vector [rows] without columns."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def format(self) -> RowFormat:
        """The format of all of them."""
        return self.entries[0].format

    @property
    def rows(self) -> int:
        """Rows of the matrix, or elements of the vector."""
        return sum(entry.shape[0] for entry in self.entries)

    @property
    def columns(self) -> int | None:
        """Elements of a row; None for a vector."""
        shape = self.entries[0].shape
        return shape[1] if self.entries[0].is_matrix else None


@dataclass(frozen=True)
class Table:
    """The cosines or sines of `rope` at the positions [0, p), [p, d / 2]."""

    name: str
    rope: Rope
    function: str
    positions: int
    dtype: Dtype

    @property
    def shape(self) -> tuple[int, int]:
        """[p, d / 2]."""
        return self.positions, self.rope.dim // 2

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """Its bytes, piece by piece.  Angles are float32 products, as transformers computes them."""
        frequencies = self.rope.inverse_frequencies().astype(np.float32)
        function = np.cos if self.function == "cos" else np.sin
        for start in range(0, self.positions, POSITIONS_AT_ONCE):
            steps = np.arange(start, min(start + POSITIONS_AT_ONCE, self.positions), dtype=np.float32)
            angles = (steps[:, None] * frequencies).astype(np.float64)
            values = function(angles) * self.rope.attention_factor
            yield values.astype("<f4" if self.dtype == "F32" else "<f2").reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Array:
    """One array in the file of external data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """A file of external data.

    Attributes:
        stem: file name of the graph without `.onnx`.
        modules: by name, with `.weight` or `.bias`.
        arrays: by name.
        tables: rotary tables, which no entry of the plan holds.
        places: entry name -> where its rows go.
    """

    stem: str
    modules: Mapping[str, Module]
    arrays: Mapping[str, Array]
    tables: tuple[Table, ...]
    places: Mapping[str, tuple[ByteRange, ...]]

    @property
    def graph(self) -> str:
        """Path of the graph in the folder."""
        return f"onnx/{self.stem}.onnx"

    @property
    def data(self) -> str:
        """Path of the external data in the folder."""
        return f"{self.graph}_data"

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return max(array.offset + array.nbytes for array in self.arrays.values())


def module_name(tensor: Tensor) -> str:
    """The module that `tensor` belongs to, with its part."""
    return f"{PACKED.get(tensor.role, NAMES[tensor.role]).format(*tensor.index)}.{tensor.part}"


def layout_of(stem: str, entries: Iterable[Entry], tables: Sequence[Table], file: int) -> Layout:
    """Where everything goes.

    Args:
        stem: file name of the graph without `.onnx`.
        entries: in the order of the forward pass.
        tables: what follows them.
        file: number of the file among those of the output.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.tensor is not None:
            groups.setdefault(module_name(entry.tensor), []).append(entry)
    modules = {name: Module(name, tuple(group)) for name, group in groups.items()}
    arrays: dict[str, Array] = {}
    places: dict[str, list[ByteRange]] = {}
    end = 0
    for module in modules.values():
        first = 0
        for name, dtype, shape, width in _arrays(module):
            array = Array(name, dtype, shape, _aligned(end, width * module.rows), width * module.rows)
            end = array.offset + array.nbytes
            arrays[name] = array
            upright = isinstance(module.format, ChannelFormat) and len(shape) == 2
            for owner, place in _places(module, ByteRange(array.offset, width, first, file), upright=upright):
                places.setdefault(owner, []).append(place)
            first += width
    for table in tables:
        nbytes = table.shape[0] * table.shape[1] * SIZES[table.dtype]
        arrays[table.name] = Array(table.name, table.dtype, table.shape, _aligned(end, nbytes), nbytes)
        end = arrays[table.name].offset + nbytes
    frozen = {name: tuple(found) for name, found in places.items()}
    return Layout(stem, modules, arrays, tuple(tables), frozen)


def _aligned(end: int, nbytes: int) -> int:
    unit = PAGE if nbytes >= PAGE else LINE
    return -(-end // unit) * unit


def _arrays(module: Module) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, element type, shape, and bytes per row (per element of a vector) of the module's arrays."""
    if module.columns is None:
        [part] = module.format.parts(1)
        yield module.name, part.dtype, (module.rows,), part.nbytes
        return
    parts = module.format.parts(module.columns)
    form, base = packing_of(module.format), module.name.removesuffix(".weight")
    for part in parts:
        if form is None:
            yield module.name, part.dtype, (module.rows, part.columns), part.nbytes
        elif isinstance(form, ChannelFormat):
            shape = (part.columns, module.rows) if part.suffix == "B" else (module.rows,)
            yield f"{base}.{part.suffix}", part.dtype, shape, part.nbytes
        elif part.suffix == "B":  # [rows, blocks, bytes of a block]
            blocks = -(-module.columns // form.group)
            yield f"{base}.B", part.dtype, (module.rows, blocks, part.columns // blocks), part.nbytes
        else:
            yield f"{base}.{part.suffix}", part.dtype, (module.rows, part.columns), part.nbytes


def _places(module: Module, whole: ByteRange, *, upright: bool) -> Iterator[tuple[str, ByteRange]]:
    """Where the rows of each entry go, of an array that begins at the place `whole`; a vector is a single row."""
    offset = whole.offset
    for entry in module.entries:
        rows = entry.shape[0]
        width = whole.width if module.columns else whole.width * rows
        yield entry.name, replace(whole, offset=offset, width=width, pitch=module.rows if upright else None)
        offset += rows if upright else whole.width * rows

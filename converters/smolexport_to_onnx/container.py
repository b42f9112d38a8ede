"""The weights of a graph: one file of external data beside it, and the position of every array in it.

Rows of several tensors may form one matrix, one after another: queries, keys and values, gates and ups.  Codes with
one scale per row are transposed, [columns, rows], as MatMulInteger reads them.  Large arrays begin at a page, so that
a runtime can map them into memory.

Notation: d = rotary dimensions, p = positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smolexport.conversion.plan import ByteRange, Entry, OutputFile
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
KEEP = "num_logits_to_keep"  # the input for the number of last rows of logits to compute
POSITIONS_AT_ONCE = 4096


@dataclass(frozen=True)
class Module:
    """Tensors that the graph uses as one matrix [rows, columns], or as one vector [rows] without columns."""

    name: str
    entries: tuple[Entry, ...]
    format: RowFormat
    rows: int
    columns: int | None


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
    """A file of external data: modules and arrays by name, rotary tables, and where the rows of entries are stored.

    `stem` is the file name of the graph without `.onnx`; names of modules end in `.weight` or `.bias`.
    """

    stem: str
    modules: Mapping[str, Module]
    arrays: Mapping[str, Array]
    tables: tuple[Table, ...]
    ranges: tuple[ByteRange, ...]

    @property
    def graph(self) -> str:
        """Path of the graph in the folder."""
        return f"onnx/{self.stem}.onnx"

    @property
    def data(self) -> str:
        """Path of the external data in the folder."""
        return f"{self.graph}_data"

    @property
    def file(self) -> OutputFile:
        """The file of external data."""
        size = max(array.offset + array.nbytes for array in self.arrays.values())
        tables = tuple((self.arrays[table.name].offset, table.chunks) for table in self.tables)
        return OutputFile(self.data, b"", self.ranges, size, tables)


def module_name(tensor: Tensor) -> str:
    """The module that `tensor` belongs to, with its part."""
    return f"{PACKED.get(tensor.role, NAMES[tensor.role]).format(*tensor.index)}.{tensor.part}"


def layout_of(stem: str, entries: Iterable[Entry], tables: Sequence[Table]) -> Layout:
    """Where `entries`, in the order of the forward pass, and then `tables` are stored, for the graph `stem`."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.tensor is not None:
            groups.setdefault(module_name(entry.tensor), []).append(entry)
    modules = {}
    for name, group in groups.items():
        first = group[0]
        columns = first.shape[1] if first.is_matrix else None
        modules[name] = Module(name, tuple(group), first.format, sum(e.shape[0] for e in group), columns)
    arrays: dict[str, Array] = {}
    ranges: list[ByteRange] = []
    end = 0
    for module in modules.values():
        part = 0
        for name, dtype, shape, width in _arrays(module):
            array = Array(name, dtype, shape, _aligned(end, width * module.rows), width * module.rows)
            end = array.offset + array.nbytes
            arrays[name] = array
            ranges += _ranges(module, array, width, part)
            part += width
    for table in tables:
        nbytes = table.shape[0] * table.shape[1] * SIZES[table.dtype]
        arrays[table.name] = Array(table.name, table.dtype, table.shape, _aligned(end, nbytes), nbytes)
        end = arrays[table.name].offset + nbytes
    return Layout(stem, modules, arrays, tuple(tables), tuple(ranges))


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


def _ranges(module: Module, array: Array, width: int, first: int) -> Iterator[ByteRange]:
    """Where the rows of each entry go, of an array of `width` bytes per row; a vector is a single row."""
    transposed = isinstance(module.format, ChannelFormat) and len(array.shape) == 2
    offset = array.offset
    for entry in module.entries:
        rows = entry.shape[0]
        yield ByteRange(
            entry.name, offset, width if module.columns else width * rows, first, module.rows if transposed else None
        )
        offset += rows if transposed else width * rows

"""What an ONNX folder contains: a description, and weights in the checkpoint's own terms.

Which bytes are a quantized matrix follows from the graph: MatMulNBits has it in its attributes, and a matrix that is
only gathered from has blocks of 32: a byte per code, or two codes per byte.  Codes without an axis of blocks are
transposed, [columns, rows], with one scale per row.  External data is only read beside the graph, under a plain name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from smolexport.conversion.folder_files import as_format_errors, is_own_folder
from smolexport.conversion.inspect import FileInfo, StoredArray, StoredRows, common_format, tensor_rows
from smolexport.conversion.source_model import NAME_KEY, SCHEME_KEY
from smolexport.errors import FileFormatError, UsageError
from smolexport.model.checkpoint import read_json
from smolexport.model.spec import NAMES, Role, Tensor
from smolexport.protobuf import read_message
from smolexport.quant import FORMATS
from smolexport.quant.planar import ChannelFormat, NBits, PortableNBits
from smolexport.text import label, show
from smolexport_to_onnx.container import DTYPES, GATE_UP, QKV
from smolexport_to_onnx.schemes import SCHEMES, STEMS, Portable

DTYPE_NAMES: Mapping[int, str] = {number: name for name, number in DTYPES.items()}
SIZES: Mapping[str, int] = {"F32": 4, "U8": 1, "I8": 1, "I32": 4, "I64": 8, "BOOL": 1, "F16": 2, "BF16": 2}
MAX_GRAPH = 64 << 20  # a graph of this package is about 100 kB; beyond this there are weights inside
MAX_AXES, MAX_NAME = 8, 500
HALF_BLOCK = 16  # bytes of the smallest block at 4 bits
GENAI, POSITIONS_KEY = "genai_config.json", "smolexport.max_positions"
GRAPHS = [f"onnx/{stem}.onnx" for stem in STEMS.values()]
OURS = {"config.json", "README.md", GENAI, "onnx/", *GRAPHS, *(f"{graph}_data" for graph in GRAPHS)}
FLOATS = ("F32", "F16", "BF16")
ROLES: Mapping[str, Role] = {name: role for role, name in NAMES.items()}
SPLITS: Mapping[str, tuple[Role, ...]] = {QKV: (Role.Q, Role.K, Role.V), GATE_UP: (Role.GATE, Role.UP)}
ROTATING = {"GroupQueryAttention": slice(7, 9), "RotaryEmbedding": slice(2, 4)}  # where the tables are


@dataclass(frozen=True)
class Model:
    """A graph and the arrays beside it, of any architecture.

    `proto` is the onnx.ModelProto; `stored` maps module name and part to the matrix or vector; `tables` are rotary
    tables; `others` are arrays that are neither.
    """

    path: Path
    proto: Any
    metadata: Mapping[str, str]
    arrays: Mapping[str, StoredArray]
    stored: Mapping[str, StoredRows]
    tables: tuple[StoredArray, ...]
    others: tuple[StoredArray, ...]


def graph_paths(folder: Path) -> list[Path]:
    """The graphs in `folder`, in the order of preference; raises OSError.  Other than regular files may never end."""
    order = list(STEMS.values())
    found = [path for place in (folder / "onnx", folder) for path in place.glob("*.onnx") if path.is_file()]
    return sorted(found, key=lambda path: (path.stem not in order, order.index(path.stem) if path.stem in order else 0))


def primary_graph(path: Path) -> Path:
    """The graph that genai_config.json in `path` names, else the first; a file itself.  Raises FileFormatError."""
    try:
        if path.is_file():
            return path
        paths = graph_paths(path)
    except OSError as error:
        raise FileFormatError(f"{path}: {error.strerror or error}") from error
    if not paths:
        raise FileFormatError(f"{path}: no *.onnx in it; the folder is not an ONNX folder")
    named = _named(path)
    return next((found for found in paths if found.relative_to(path).as_posix() == named), paths[0])


def _named(folder: Path) -> object:
    """What genai_config.json calls the decoder's file; None if there is no such file."""
    if not (folder / GENAI).is_file():
        return None
    with as_format_errors(folder):
        model = read_json(folder / GENAI).get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    return decoder.get("filename") if isinstance(decoder, dict) else None


def recognises(path: Path) -> bool:
    """Whether `path` is a folder with a graph in it, or the graph itself.

    A folder with safetensors is a checkpoint: many contain an ONNX file that somebody else made.
    """
    try:
        if path.is_file():
            return path.suffix == ".onnx"
        return path.is_dir() and bool(graph_paths(path)) and next(path.glob("*.safetensors"), None) is None
    except OSError:
        return False


def replaceable(path: Path) -> bool:
    """Whether `path` is a folder that smolexport made, and that holds nothing else."""
    return is_own_folder(
        path,
        OURS.__contains__,
        lambda folder: [metadata_of(read_graph(graph)) for graph in graph_paths(folder)],
    )


def describe(path: Path) -> FileInfo:
    """Read the graph that `path` is run by, of any architecture; no tensor data.  Raises FileFormatError."""
    model = read_model(primary_graph(path))
    folder = path if path.is_dir() else path.parent.parent if path.parent.name == "onnx" else path.parent
    config: Mapping[str, Any] = {}
    if (folder / "config.json").is_file():
        with as_format_errors(folder):
            config = read_json(folder / "config.json")
    # Anything may be beside a bare graph; its own files are those that hold its weights.
    beside = {array.path for array in model.arrays.values()}
    files = {file for file in path.rglob("*") if file.is_file()} if path.is_dir() else {path, *beside}
    return FileInfo(
        path=path,
        format="onnx",
        architecture=str(config.get("model_type", "?")),
        name=model.metadata.get(NAME_KEY, folder.resolve().name),
        scheme=_scheme(path, model),
        bytes=sum(file.stat().st_size for file in files),
        metadata={**model.metadata, **{f"config.{key}": value for key, value in config.items()}},
        tensors=tensor_rows(model.stored, model.others),
    )


def _scheme(path: Path, model: Model) -> str:
    """The recorded scheme, and those of the graphs beside it; of a foreign graph, the format of most weights."""
    own = model.metadata.get(SCHEME_KEY)
    if own not in SCHEMES:
        return common_format(model.stored)
    beside = [] if path.is_file() else [graph for graph in graph_paths(path) if graph != model.path]
    others = (metadata_of(read_graph(graph)).get(SCHEME_KEY) for graph in beside)
    return "+".join(name for name in (own, *others) if name and name in SCHEMES)


def weights(path: Path) -> Mapping[Tensor, StoredRows]:
    """The tensors of the folder `path`, or of one graph in it, in the terms of a checkpoint; raises FileFormatError."""
    model = read_model(primary_graph(path))
    for array in model.others:
        raise FileFormatError(
            f"{model.path}: the array {label(array.name)}, {array.dtype} {list(array.shape)}, "
            "belongs to no known module"
        )
    heads = dict(_heads(model.proto.graph))
    tensors: dict[Tensor, StoredRows] = {}
    for name, stored in model.stored.items():
        tensors |= _tensors(model.path, name, stored, heads)
    return tensors


def read_graph(path: Path) -> Any:
    """The onnx.ModelProto in the file `path`; no weight is read.  Raises FileFormatError."""
    from onnx import ModelProto

    size = path.stat().st_size if path.is_file() else 0
    if size > MAX_GRAPH:
        raise FileFormatError(f"{path}: {size >> 20} MiB; a graph with its weights beside it is far smaller")
    model = read_message(path, ModelProto)
    if not model.HasField("graph"):
        raise FileFormatError(f"{path}: is damaged or not an ONNX file (there is no graph in it)")
    return model


def metadata_of(model: Any) -> dict[str, str]:
    """The strings of an onnx.ModelProto about itself."""
    return {_text(pair.key): _text(pair.value) for pair in model.metadata_props}


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")


def read_model(path: Path) -> Model:
    """Read the graph `path`; of the weights only that they exist.  Raises FileFormatError."""
    model = read_graph(path)
    graph, metadata = model.graph, metadata_of(model)
    arrays: dict[str, StoredArray] = {}
    for tensor in graph.initializer:
        if tensor.name in arrays:
            raise FileFormatError(f"{path}: the array {label(tensor.name)} is in it twice")
        array = _array(path, tensor)
        if array is not None:
            arrays[array.name] = array
    files = {array.path: array.path.stat().st_size for array in arrays.values()}
    if sum(array.nbytes for array in arrays.values()) > 2 * sum(files.values()):  # a tied head may have its bytes twice
        raise FileFormatError(f"{path}: its arrays share their bytes; the file is damaged")
    products = {node.input[1]: node for node in graph.node if node.op_type == "MatMulNBits" and len(node.input) > 2}
    tables = {name for node in graph.node for name in node.input[ROTATING.get(node.op_type, slice(0))]}
    stored, used = dict[str, StoredRows](), tables & arrays.keys()
    for name in arrays:
        parts = _parts_of(name, arrays, products.get(name))
        if parts:
            stored[f"{name.removesuffix('.B')}.weight"] = _packed(
                path, parts, products.get(name), metadata.get(SCHEME_KEY, "")
            )
            used |= {part.name for part in parts}
    for name, array in arrays.items():
        if name not in used and array.dtype in FLOATS and len(array.shape) in (1, 2) and all(array.shape):
            stored[name] = StoredRows(FORMATS[array.dtype.lower()], array.shape, (array,))
            used.add(name)
    order = {name: number for number, name in enumerate(arrays)}
    ordered = dict(sorted(stored.items(), key=lambda item: order[item[1].parts[0].name]))
    others = tuple(array for name, array in arrays.items() if name not in used)
    positions = tuple(array for name, array in arrays.items() if name in tables)
    return Model(path, model, metadata, arrays, ordered, positions, others)


def _array(path: Path, tensor: Any) -> StoredArray | None:
    """Where the onnx.TensorProto is stored, None in the graph; raises FileFormatError."""
    name, shape = tensor.name, tuple(tensor.dims[: MAX_AXES + 1])
    if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME:
        raise FileFormatError(f"{path}: is damaged or not an ONNX file (a constant without a readable name)")
    if len(shape) > MAX_AXES or any(size < 0 for size in shape):
        raise FileFormatError(f"{path}: the constant {show(name)} has the shape {list(shape)}")
    if tensor.data_location != tensor.EXTERNAL:
        return None
    place = {_text(pair.key): _text(pair.value) for pair in tensor.external_data}
    location, offset, length = (
        place.get(key, "" if key == "location" else "0") for key in ("location", "offset", "length")
    )
    if not all(value.isascii() and value.isdecimal() and len(value) < 20 for value in (offset, length)):
        raise FileFormatError(f"{path}: {label(name)} has the offset {show(offset, 40)}, length {show(length, 40)}")
    if not location or location in (".", "..") or any(c in location for c in "/\\:\0"):
        raise FileFormatError(
            f"{path}: {label(name)} is stored in {show(location)}, which is not a file beside the graph"
        )
    beside, shown = path.parent / location, path.parent / label(location)
    dtype = DTYPE_NAMES.get(tensor.data_type, f"type {tensor.data_type}")
    nbytes = prod(shape) * SIZES[dtype] if dtype in SIZES else int(length)
    if int(length) not in (0, nbytes):
        raise FileFormatError(f"{path}: {label(name)} {list(shape)} should have {nbytes} bytes, has {length}")
    try:
        size = beside.stat().st_size if beside.is_file() else None
    except OSError as error:
        raise FileFormatError(f"{shown}: {error.strerror or error}") from error
    if size is None:
        raise FileFormatError(f"{shown}: not found, but {path.name} names it; weights and graph belong together")
    if int(offset) + nbytes > size:
        raise FileFormatError(f"{beside}: ends inside the array {label(name)}; the file is cut off")
    return StoredArray(name, beside, dtype, shape, int(offset), nbytes)


def _parts_of(name: str, arrays: Mapping[str, StoredArray], node: Any) -> tuple[StoredArray, ...]:
    """Codes, scales and zero points of the matrix whose codes are named `name`; else empty."""
    if node is not None:
        names = (name, *(other for other in node.input[2:4] if other))
    elif name.endswith(".B"):
        names = (name, f"{name[:-2]}.scales", f"{name[:-2]}.zero_points")
        names = tuple(other for other in names if other in arrays)
    else:
        return ()
    return tuple(arrays[other] for other in names if other in arrays) if len(names) > 1 else ()


def _packed(path: Path, parts: tuple[StoredArray, ...], node: Any, scheme: str) -> StoredRows:
    """A quantized matrix; raises FileFormatError if its arrays do not form one."""
    codes, scales = parts[0], parts[1] if len(parts) > 1 else parts[0]
    if node is None and len(codes.shape) == 2:
        return _transposed(path, codes, parts[1:])
    bits, group, columns = _setting(codes, node)
    rows = codes.shape[0] if codes.shape else 0
    try:
        if not all(codes.shape) or columns < 1 or group < 1:
            raise UsageError(f"codes of the shape {list(codes.shape)} in blocks of {group}")
        form = NBits(bits, group, scales.dtype, len(parts) < 3)  # type: ignore[arg-type]  # checked there
        due = form.parts(columns)
    except UsageError as error:
        raise FileFormatError(f"{path}: {codes.name}: {error}") from error
    found = [(part.dtype, part.nbytes) for part in parts]
    if found != [(part.dtype, part.nbytes * rows) for part in due]:
        raise FileFormatError(
            f"{path}: the arrays of {codes.name} are {', '.join(f'{p.dtype} {list(p.shape)}' for p in parts)}, "
            f"which do not form {form.name} of {rows} x {columns}"
        )
    return StoredRows(_portable(form, scheme) or form, (rows, columns), parts)


def _transposed(path: Path, codes: StoredArray, others: tuple[StoredArray, ...]) -> StoredRows:
    columns, rows = codes.shape
    found = [(part.dtype, part.shape) for part in others]
    if codes.dtype != "U8" or not columns or not rows or found != [("F32", (rows,))]:
        raise FileFormatError(f"{path}: the arrays of {codes.name} {list(codes.shape)} are not rows with a scale each")
    return StoredRows(ChannelFormat(), (rows, columns), (replace(codes, transposed=True), *others))


def _portable(form: NBits, scheme: str) -> PortableNBits | None:
    """The format under the name that it has in a plan: what `scheme` stores in a canonical format."""
    own = SCHEMES.get(scheme)
    eight = own is not None and form.bits == 8
    if form.group != 32 or form.symmetric or not (eight or isinstance(own, Portable)):
        return None
    return PortableNBits(form.bits, form.dtype)


def _setting(codes: StoredArray, node: Any) -> tuple[int, int, int]:
    """Bits, elements of a block, elements of a row."""
    if node is not None:
        given = _integers(node)
        return given.get("bits", 4), given.get("block_size", 0), given.get("K", 0)
    if len(codes.shape) != 3:
        return 8, 0, 0
    _, blocks, nbytes = codes.shape
    bits = 4 if nbytes == HALF_BLOCK else 8
    return bits, nbytes * 8 // bits, blocks * nbytes * 8 // bits


def _integers(node: Any) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute if attribute.type == attribute.INT}


def _heads(graph: Any) -> Iterator[tuple[int, tuple[int, int]]]:
    attention = (node for node in graph.node if node.op_type == "GroupQueryAttention")
    for layer, node in enumerate(attention):
        given = _integers(node)
        yield layer, (given.get("num_heads", 0), given.get("kv_num_heads", 0))


def _tensors(
    path: Path, name: str, stored: StoredRows, heads: Mapping[int, tuple[int, int]]
) -> Iterator[tuple[Tensor, StoredRows]]:
    """The tensors that the module `name` holds; raises FileFormatError if it is unknown."""
    module, _, part = name.rpartition(".")
    words = module.split(".")
    layer = next((int(word) for word in words if word.isdecimal() and len(word) < 6), None)
    general = module if layer is None else ".".join("{}" if word == str(layer) else word for word in words)
    roles = SPLITS.get(general) or (ROLES[general],) if general in {*SPLITS, *ROLES} else ()
    shares = _shares(general, heads.get(-1 if layer is None else layer, (0, 0)))
    rows = stored.shape[0]
    if not roles or part not in ("weight", "bias") or min(shares) < 1 or rows % sum(shares):
        raise FileFormatError(f"{path}: the array {label(name)} {list(stored.shape)} is not part of a known module")
    first = 0
    for role, share in zip(roles, shares, strict=True):
        own = rows // sum(shares) * share
        shape = (own, *stored.shape[1:])
        yield Tensor(role, () if layer is None else (layer,), part, shape), replace(stored, shape=shape, first=first)
        first += own


def _shares(general: str, heads: tuple[int, int]) -> tuple[int, ...]:
    """How the rows of a module are divided among its tensors."""
    if general == QKV:
        return heads[0], heads[1], heads[1]
    return (1, 1) if general == GATE_UP else (1,)

"""Whether a finished folder is what every reader of MLX folders expects, from its headers alone.

mlx-lm tolerates much that mlx-swift refuses or, worse, computes with defaults; here nothing is tolerated.

Notation: g = group size, b = bits, a module's weight is [out, in] before packing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smolexport.conversion.folder_files import as_format_errors
from smolexport.conversion.inspect import StoredArray
from smolexport.errors import ConfigError
from smolexport.model.arch import load_spec
from smolexport.model.checkpoint import read_json
from smolexport.model.spec import ModelSpec
from smolexport.quant import planar
from smolexport.text import label, show
from smolexport_to_mlx.container import INDEX, read_headers
from smolexport_to_mlx.folder import DTYPES
from smolexport_to_mlx.schemes import PIECE, is_whole_pieces

FLOATS = frozenset(DTYPES)
KEYS = ("group_size", "bits", "mode")
# mode -> (group sizes, bits) that every reader supports
MODES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": (planar.GROUPS, planar.AFFINE_BITS),
    **{mode: ((group,), (bits,)) for mode, (bits, group) in planar.MODES.items()},
}


def lint(folder: Path) -> list[str]:
    """Everything about `folder` that some reader would refuse or misread; raises FileFormatError.

    Checked: config.json (both spellings of rope and of quantization, integers, no unknown keys, the tie flag), every
    tensor against its shapes, packed shapes against bits and group sizes, modules that differ from the default without
    being named, one float dtype, file metadata, the index.
    """
    with as_format_errors(folder):
        return list(_findings(folder))


def _findings(folder: Path) -> Iterator[str]:
    config = read_json(folder / "config.json", "the folder is not an MLX folder")
    tensors, odd_files = _tensors(folder)
    table, odd_entries = _quantization(config, tensors)
    yield from odd_files
    yield from _config(config)
    yield from _index(folder, tensors)
    yield from odd_entries
    yield from _dtypes(config, tensors)
    plain = {key: value for key, value in config.items() if not key.startswith("quantization")}
    try:
        spec = load_spec(plain, strict=False)
    except ConfigError as error:
        yield str(error)
    else:
        yield from _modules(spec, tensors, table)


def _tensors(folder: Path) -> tuple[dict[str, StoredArray], list[str]]:
    tensors: dict[str, StoredArray] = {}
    odd = []
    for path, (metadata, arrays) in read_headers(folder).items():
        if metadata.get("format") != "mlx":
            odd.append(f"{path.name}: its metadata should have format = mlx, has {show(metadata.get('format'))}")
        twice = sorted(array.name for array in arrays if array.name in tensors)
        odd += [f"{path.name}: tensor {show(name)} is in {tensors[name].path.name} too" for name in twice]
        tensors |= {array.name: array for array in arrays}
    return tensors, odd


def _config(config: Mapping[str, Any]) -> Iterator[str]:
    theta, new, old = (config.get(key) for key in ("rope_theta", "rope_parameters", "rope_scaling"))
    inner = new.get("rope_theta") if isinstance(new, dict) else None
    if not _number(theta) or theta != inner:
        yield f"rope_theta is {show(theta)} at top level and {show(inner)} in rope_parameters; both readers need it"
    if isinstance(new, dict):
        kind, rest = new.get("rope_type"), {key: value for key, value in new.items() if key != "rope_theta"}
        if kind == "default" and "rope_scaling" in config:
            yield f"rope_scaling is {show(old)} although rope_parameters is of type default; it should be left out"
        if kind != "default" and old != rest:
            yield f"rope_scaling is {show(old)}; it should be rope_parameters without rope_theta"
    if not isinstance(config.get("tie_word_embeddings"), bool):
        yield f"tie_word_embeddings is {show(config.get('tie_word_embeddings'))}; readers differ on its default"
    for key in ("head_dim", "num_key_value_heads"):
        if not _whole(config.get(key)):
            yield f"{key} is {show(config.get(key))}; it should be spelled out"
    eos = config.get("eos_token_id", "absent")
    if not (eos is None or _whole(eos) or (isinstance(eos, list) and eos and all(map(_whole, eos)))):
        yield f"eos_token_id is {show(eos)}; it should be an id, a list of ids, or null"
    for key in ("auto_map", "model_file", "_name_or_path"):
        if key in config:
            yield f"{key} should not be in config.json"


def _index(folder: Path, tensors: Mapping[str, StoredArray]) -> Iterator[str]:
    if not (folder / INDEX).exists():
        yield f"{INDEX} is missing; Swift and the hub read it"
        return
    index = read_json(folder / INDEX)
    places, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(places, dict) or not isinstance(metadata, dict):
        yield f"{INDEX}: should hold the objects weight_map and metadata"
        return
    true = {name: array.path.name for name, array in tensors.items()}
    wrong = sorted(n for n in places.keys() | true.keys() if n not in true or places.get(n) != true[n])
    if wrong:
        yield (
            f"{INDEX}: {len(wrong)} tensors are not where it says, first {show(wrong[0])}: "
            f"{show(places.get(wrong[0]))} in the index, actually {true.get(wrong[0], 'nowhere')}"
        )
    total = sum(t.nbytes for t in tensors.values())
    if metadata.get("total_size") != total:
        yield f"{INDEX}: total_size is {show(metadata.get('total_size'))}, the tensors have {total} bytes"


Table = Mapping[str, Mapping[str, Any] | bool]  # module path -> its entry; "" -> the default


def _quantization(config: Mapping[str, Any], tensors: Mapping[str, StoredArray]) -> tuple[Table, list[str]]:
    """The entry of each module in `quantization`, and what is odd about it."""
    found, copy = config.get("quantization"), config.get("quantization_config")
    if found is None and copy is None:
        return {}, []
    odd = [] if found == copy else ["quantization and quantization_config differ; readers use one or the other"]
    if not isinstance(found, dict):
        return {}, [*odd, f"quantization is {show(found)}; it should be an object"]
    table: dict[str, Mapping[str, Any] | bool] = {"": {key: found[key] for key in KEYS if key in found}}
    for key, value in found.items():
        if key in KEYS:
            continue
        if f"{key}.weight" not in tensors:
            odd.append(f"quantization holds the key {show(key)}, which is not a module; Swift throws")
        elif isinstance(value, dict) or value is False:
            table[key] = value
        else:
            odd.append(f"quantization of {label(key)} is {show(value)}; it should be an object or false")
    for path, entry in table.items():
        if isinstance(entry, dict):
            odd += [f"quantization of {label(path) or 'the default'}: {reason}" for reason in _entry(entry)]
    return table, odd


def _entry(entry: Mapping[str, Any]) -> Iterator[str]:
    for key in ("group_size", "bits"):
        if not _whole(entry.get(key)):
            yield f"{key} is {show(entry.get(key))}; it should be an integer"
    yield from (f"the key {show(key)} is unknown; Swift throws" for key in entry if key not in KEYS)
    mode = entry.get("mode", "affine")
    groups, bits = MODES.get(mode, ((), ())) if isinstance(mode, str) else ((), ())
    if not groups:
        yield f"mode is {show(mode)}; known: {', '.join(MODES)}"
    elif entry.get("group_size") not in groups or entry.get("bits") not in bits:
        yield f"mode {mode} has no {show(entry.get('bits'))} bits with groups of {show(entry.get('group_size'))}"


def _modules(spec: ModelSpec, tensors: Mapping[str, StoredArray], table: Table) -> Iterator[str]:
    left = dict(tensors)
    for tensor in spec.tensors():
        found, path = left.pop(tensor.stored_name, None), tensor.stored_name.removesuffix(".weight")
        scales, biases = (left.pop(f"{path}.{part}", None) for part in ("scales", "biases"))
        matrix = tensor.is_matrix
        if found is None:
            yield f"tensor {tensor.stored_name} {list(tensor.shape)} is missing"
        elif scales is not None and matrix:
            entry = table.get(path, table.get("", False))
            yield from (f"{path}: {reason}" for reason in _packed(tensor.shape, found, scales, biases, entry))
            if not is_whole_pieces(tensor):
                yield f"{path}: MLX on a CPU cannot unpack its rows of {tensor.shape[-1]}, not a multiple of {PIECE}"
        elif found.dtype not in FLOATS or found.shape != tensor.shape or scales is not None or biases is not None:
            there = f"{found.dtype} {list(found.shape)}" + (" with scales or biases" if scales or biases else "")
            yield f"tensor {tensor.stored_name} is {there}, it should be float {list(tensor.shape)}"
        elif matrix and table and table.get(path) is not False:
            yield f"{path} is float in a quantized folder without being named as such (false)"
    if left:
        tied = " of a tied model" if spec.tied and any(name.startswith("lm_head.") for name in left) else ""
        yield f"tensor {show(min(left))}{tied} is not part of the model ({len(left)} such); loading is strict"


def _packed(
    shape: tuple[int, ...],
    weight: StoredArray,
    scales: StoredArray,
    biases: StoredArray | None,
    entry: Mapping[str, Any] | bool,
) -> Iterator[str]:
    """A quantized [out, in] `shape` against its entry: weight [out, in b / 32], scales and biases [out, in / g]."""
    if isinstance(entry, bool):
        yield "has scales although config.json leaves it float"
        return
    group, bits, mode = entry.get("group_size"), entry.get("bits"), entry.get("mode", "affine")
    if not (isinstance(group, int) and isinstance(bits, int) and group > 0 and bits > 0):
        return  # reported already
    rows, columns = shape
    if columns % group or columns * bits % 32:
        yield f"rows of {columns} are not a multiple of {group}, but it is quantized"
        return
    kinds = FLOATS if mode == "affine" else {"U8"}
    if (weight.dtype, weight.shape) != ("U32", (rows, columns * bits // 32)):
        yield (
            f"{bits} bits need a weight of U32 {[rows, columns * bits // 32]}, "
            f"there is {weight.dtype} {list(weight.shape)}"
        )
    for name, part in (("scales", scales), ("biases", biases)):
        if part is None:
            if mode == "affine":
                yield f"mode affine needs {name}, there are none"
        elif name == "biases" and mode != "affine":
            yield f"mode {mode} has no biases, there are some"
        elif part.dtype not in kinds or part.shape != (rows, columns // group):
            yield (
                f"groups of {group} need {name} of {'/'.join(sorted(kinds))} {[rows, columns // group]}, "
                f"there are {part.dtype} {list(part.shape)}"
            )


def _dtypes(config: Mapping[str, Any], tensors: Mapping[str, StoredArray]) -> Iterator[str]:
    kinds = sorted({t.dtype for t in tensors.values() if t.dtype not in ("U8", "U32")})
    if len(kinds) != 1:
        yield f"the float tensors are of {len(kinds)} dtypes ({', '.join(kinds)}); mixed ones are computed in float32"
    for key in ("dtype", "torch_dtype"):
        if config.get(key) not in [DTYPES.get(kind) for kind in kinds]:
            yield f"{key} is {show(config.get(key))}, the float tensors are {', '.join(kinds)}"


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in (int, float)

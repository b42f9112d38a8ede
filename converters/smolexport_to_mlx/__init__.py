"""MLX folders, as mlx-lm on a Mac and mlx-swift on a phone load them; made on any system, without MLX.

A few functions and a table; the driver calls them in this order: `check(spec)` says why mlx-lm could not run the
model, `plan(model, scheme)` decides every tensor and every small file, `output(plan, path)` takes the encoded rows,
`weights(path)` decodes them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from smolexport.conversion import portable
from smolexport.conversion.model_card import installed_version
from smolexport.conversion.plan import Companion, Entry, Plan
from smolexport.conversion.source_model import CALIBRATION_KEY, SourceModel
from smolexport.conversion.writer import Sink
from smolexport.errors import UsageError
from smolexport.files import atomic_folder, check_target
from smolexport.model.spec import Tensor
from smolexport.quant.planar import MicroFormat
from smolexport_to_mlx import architectures, companions
from smolexport_to_mlx.card import card
from smolexport_to_mlx.config import compose, quantization_object
from smolexport_to_mlx.container import INDEX, Shard, arrays_of, index_json, places_of, shards_of
from smolexport_to_mlx.description import NAME_KEY, SCHEME_KEY, describe, recognises, replaceable
from smolexport_to_mlx.lint import lint
from smolexport_to_mlx.reading import weights
from smolexport_to_mlx.schemes import (
    DTYPES,
    PIECE,
    SCHEMES,
    Affine,
    Dtype,
    Encoder,
    Portable,
    Scheme,
    find_scheme,
    setting_of,
)

__all__ = [
    "DEFAULT",
    "FOLDER",
    "FORMAT",
    "OPTIONS",
    "SCHEMES",
    "SUFFIX",
    "bit_choices",
    "check",
    "describe",
    "find_scheme",
    "lint",
    "output",
    "plan",
    "recognises",
    "replaceable",
    "size",
    "weights",
]

FORMAT = "mlx"
SUFFIX = "-mlx"
FOLDER = True
DEFAULT = "q4"
OPTIONS: Mapping[str, str] = {
    "dtype": "float type of scales, norms and biases: bf16, f16 or f32; default: the checkpoint's own",
    "encoder": "how codes are found: mlx (the bytes of mx.quantize), recode or search (closer to the weights)",
}
ENCODERS: Mapping[str, Encoder] = {"mlx": "mlx", "recode": "recode", "search": "search"}

check = architectures.check


def plan(model: SourceModel, scheme: str, *, dtype: str | None = None, encoder: str = "mlx") -> Plan:
    """Decide every tensor and every small file of the folder.

    Args:
        model: a model whose spec `check` has passed.
        scheme: a name of `SCHEMES` or an alias.
        dtype: float type of all tensors that are not quantized, and of scales and biases: `bf16`, `f16` or `f32`;
            None = what the scheme prescribes, else the checkpoint's own.
        encoder: `mlx`, `recode` or `search`; see `AffineFormat`.

    Raises:
        UsageError: an unknown scheme or option, or an option that the scheme does not leave open.
        CheckpointError: a small file of the checkpoint is damaged.
    """
    chosen = _decided(find_scheme(scheme), model)
    floats, how = _dtype(chosen, model, dtype), _encoder(chosen, encoder)
    entries = []
    for tensor in model.spec.tensors():
        choice = chosen.choose(tensor, model.spec, floats, how)
        entries.append(Entry(tensor.stored_name, choice.format, tensor.shape, tensor, choice.wanted))
    config = compose(model, _quantization(chosen, entries), floats)
    notes = (
        *([portable.NOTE] if chosen.name in portable.SCHEMES else []),
        *architectures.notes(model.spec),
        *_half_pieces(entries),
        *companions.notes(model),
    )
    strings = _strings(model, chosen)
    bare = Plan(FORMAT, model.spec.model_type, chosen.name, tuple(entries))
    shards = shards_of(arrays_of(entries), strings)
    lines = [*bare.fallback_lines(), *notes]
    files = {
        "config.json": (json.dumps(config, indent=4, ensure_ascii=False) + "\n").encode(),
        INDEX: index_json(shards, bare.weights),
        "README.md": card(model, chosen.name, bare.bits_per_weight, lines),
    }
    made = (Companion(name, content) for name, content in files.items())
    return Plan(
        FORMAT,
        model.spec.model_type,
        chosen.name,
        tuple(entries),
        (
            *((f"header.{key}", "string", value) for key, value in strings.items()),
            *((f"config.{key}", "json", value) for key, value in config.items()),
        ),
        notes,
        (*made, *companions.companions(model)),
    )


def _decided(scheme: Scheme, model: SourceModel) -> Scheme:
    if isinstance(scheme, Portable) and scheme.name == portable.AUTO_BITS:
        return replace(scheme, bits=portable.decided(model.bits))
    return scheme


def _dtype(scheme: Scheme, model: SourceModel, asked: str | None) -> Dtype:
    if asked is not None and asked not in DTYPES:
        raise UsageError(f"--set dtype={asked}: should be one of {', '.join(DTYPES)}")
    fixed = scheme.dtype
    if asked is None:
        return next(d for d in DTYPES.values() if d == (fixed or model.dtype))
    if fixed is not None and fixed != DTYPES[asked]:
        raise UsageError(f"--set dtype={asked}: the scheme {scheme.name} is {fixed.lower()} by definition")
    return DTYPES[asked]


def _encoder(scheme: Scheme, asked: str) -> Encoder:
    if asked not in ENCODERS:
        raise UsageError(f"--set encoder={asked}: should be one of {', '.join(ENCODERS)}")
    if asked != "mlx" and not isinstance(scheme, Affine):
        raise UsageError(f"--set encoder={asked}: is for the affine schemes q2 … q8 and mixed_*, not for {scheme.name}")
    return ENCODERS[asked]


def _quantization(scheme: Scheme, entries: list[Entry]) -> dict[str, object] | None:
    """The object `quantization` of config.json; None for a folder of floats."""
    default = setting_of(scheme.common) if scheme.common else False
    if default is False:
        return None
    matrices = {e.name.removesuffix(".weight"): setting_of(e.format) for e in entries if e.is_matrix}
    return quantization_object(default, matrices)


def _half_pieces(entries: list[Entry]) -> Iterator[str]:
    """A line about matrices whose rows end in a group of 16, half of what MLX on a GPU multiplies at a time."""
    rows = sorted({e.shape[-1] for e in entries if isinstance(e.format, MicroFormat) and e.shape[-1] % PIECE})
    if rows:
        yield (
            f"rows of {', '.join(map(str, rows))} are not a multiple of {PIECE}, the step of MLX's matrix product on a "
            "GPU: right on a CPU, not tried there"
        )


def _strings(model: SourceModel, scheme: Scheme) -> dict[str, str]:
    """What the weights say about themselves."""
    strings = {"format": "mlx", SCHEME_KEY: scheme.name, NAME_KEY: model.name}
    strings["smolexport.version"] = installed_version()
    return {**strings, CALIBRATION_KEY: model.calibration} if model.calibration else strings


def bit_choices(tensor: Tensor) -> tuple[int, ...]:
    """Bits that the scheme `auto-bits` can give `tensor`, most first."""
    return (8, 6, 5, 4) if tensor.is_matrix and tensor.columns % portable.BLOCK == 0 else ()


def size(plan: Plan) -> int:
    """Bytes of all files of the folder."""
    return sum(s.nbytes for s in _shards(plan)) + sum(c.nbytes for c in plan.companions)


def _shards(plan: Plan) -> list[Shard]:
    strings = {key.removeprefix("header."): value for key, _, value in plan.metadata if key.startswith("header.")}
    return shards_of(arrays_of(plan.entries), strings)


@contextmanager
def output(plan: Plan, path: Path, *, force: bool = False) -> Iterator[Sink]:
    """Open the folder `path` for the plan's tensors; it appears whole, when the block ends, or not at all.

    Args:
        plan: what `plan` made.
        path: the target folder.
        force: replace an earlier output that stands there.

    Raises:
        OutputError: the target exists or cannot be written.
    """
    shards = _shards(plan)
    check_target(path, size(plan), force=force, replaceable=replaceable)
    names = [*(shard.name for shard in shards), *(companion.name for companion in plan.companions)]
    with atomic_folder(path, replaceable=replaceable if force else None) as folder, ExitStack() as stack:
        for companion in plan.companions:
            target = folder / companion.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(companion.read())
        files = []
        for shard in shards:
            file = stack.enter_context((folder / shard.name).open("wb"))
            file.write(shard.header)
            file.truncate(shard.nbytes)
            files.append(file)
        yield Sink([path / name for name in names], files, places_of(shards))

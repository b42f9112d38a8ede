"""MLX folders, as mlx-lm on a Mac and mlx-swift on a phone load them; made on any system, without MLX.

The driver calls `check(spec)`, which says why mlx-lm could not run the model, then `plan(model, scheme)`, which
decides every tensor and every file; `weights(path)` decodes a finished folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from smolexport.conversion import portable
from smolexport.conversion.folder_files import json_bytes
from smolexport.conversion.plan import Entry, OutputFile, Plan
from smolexport.conversion.source_model import SourceModel, provenance
from smolexport.errors import UsageError
from smolexport.model.spec import Tensor
from smolexport.quant.planar import MicroFormat
from smolexport_to_mlx import architectures, folder, reading, schemes
from smolexport_to_mlx.container import weight_files
from smolexport_to_mlx.lint import lint as lint
from smolexport_to_mlx.schemes import DTYPES, PIECE, Affine, Encoder, Scheme, setting_of

FORMAT = "mlx"
SUFFIX = "-mlx"
FOLDER = True
DEFAULT = "q4"
OPTIONS: Mapping[str, str] = {
    "dtype": "float type of scales, norms and biases: bf16, f16 or f32; default: the checkpoint's own",
    "encoder": "how codes are found: mlx (the bytes of mx.quantize), recode or search (closer to the weights)",
}
ENCODERS: Mapping[str, Encoder] = {"mlx": "mlx", "recode": "recode", "search": "search"}
SCHEMES, find_scheme, check = schemes.SCHEMES, schemes.find_scheme, architectures.check
describe, recognises, replaceable, weights = (
    reading.describe, reading.recognises, reading.replaceable, reading.weights,
)  # fmt: skip


def plan(model: SourceModel, scheme: str, *, dtype: str | None = None, encoder: str = "mlx") -> Plan:
    """Decide every tensor and every file of the folder.

    Args:
        model: a model whose spec `check` has passed.
        scheme: a name of `SCHEMES` or an alias.
        dtype: float type of all tensors that are not quantized, and of scales and biases: `bf16`, `f16` or `f32`;
            None = what the scheme prescribes, else the checkpoint's own.
        encoder: `mlx`, `recode` or `search`; see `AffineFormat`.

    Raises:
        UsageError: an unknown scheme or option, or an option that the scheme does not allow.
        CheckpointError: a small file of the checkpoint is damaged.
    """
    chosen = _configured(find_scheme(scheme), model, dtype, encoder)
    entries = [
        chosen.choose(tensor, model.spec, model.bits).entry(tensor.stored_name, tensor)
        for tensor in model.spec.tensors()
    ]
    config = folder.compose(model, _quantization(chosen, entries), chosen.dtype)
    copies, lines = folder.copied(model)
    notes = (
        *([portable.NOTE] if chosen.name in portable.SCHEMES else []),
        *architectures.notes(model.spec),
        *_half_pieces(entries),
        *lines,
    )
    strings = {"format": "mlx", **provenance(model, chosen.name)}
    metadata = (
        *((f"header.{key}", "string", value) for key, value in strings.items()),
        *((f"config.{key}", "json", value) for key, value in config.items()),
    )
    made = Plan(FORMAT, model.spec.model_type, chosen.name, tuple(entries), metadata, notes)
    *shards, index = weight_files(entries, strings)
    card = folder.card(model, chosen.name, made.bits_per_weight, [*made.fallback_lines(), *notes])
    small = (OutputFile("config.json", json_bytes(config, 4)), index, OutputFile("README.md", card))
    return replace(made, files=(*shards, *small, *copies.values()))


def _configured(scheme: Scheme, model: SourceModel, dtype: str | None, encoder: str) -> Scheme:
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--set dtype={dtype}: should be one of {', '.join(DTYPES)}")
    if dtype is not None and scheme.fixed not in (None, DTYPES[dtype]):
        raise UsageError(f"--set dtype={dtype}: the scheme {scheme.name} is {scheme.fixed.lower()} by definition")
    if encoder not in ENCODERS:
        raise UsageError(f"--set encoder={encoder}: should be one of {', '.join(ENCODERS)}")
    floats = DTYPES[dtype] if dtype else next(d for d in DTYPES.values() if d == (scheme.fixed or model.dtype))
    if isinstance(scheme, Affine):
        return replace(scheme, dtype=floats, encoder=ENCODERS[encoder])
    if encoder != "mlx":
        raise UsageError(
            f"--set encoder={encoder}: is for the affine schemes q2 … q8 and mixed_*, not for {scheme.name}"
        )
    return replace(scheme, dtype=floats)


def _quantization(scheme: Scheme, entries: Sequence[Entry]) -> dict[str, object] | None:
    """The object `quantization` of config.json; None for a folder of floats."""
    default = setting_of(scheme.common) if scheme.common else False
    if default is False:
        return None
    matrices = {e.name.removesuffix(".weight"): setting_of(e.format) for e in entries if e.is_matrix}
    return folder.quantization_object(default, matrices)


def _half_pieces(entries: Sequence[Entry]) -> Iterator[str]:
    """A line about matrices whose rows end in a group of 16, half of what MLX multiplies at a time on a GPU."""
    rows = sorted({e.shape[-1] for e in entries if isinstance(e.format, MicroFormat) and e.shape[-1] % PIECE})
    if rows:
        yield (
            f"rows of {', '.join(map(str, rows))} are not a multiple of {PIECE}, the step of MLX's matrix product on a "
            "GPU: correct on a CPU, untested there"
        )


def bit_choices(tensor: Tensor) -> tuple[int, ...]:
    """Bits that the scheme `auto-bits` can give `tensor`, most first."""
    return (8, 6, 5, 4) if tensor.is_matrix and tensor.columns % portable.BLOCK == 0 else ()

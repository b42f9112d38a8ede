"""GGUF, the format of llama.cpp: check, plan, write, read back.

The driver calls `check(spec)`, which says why llama.cpp could not run the model, then `plan(model, scheme)`, which
decides every tensor and key; `weights(path)` decodes a finished file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

from smolexport.conversion import portable
from smolexport.conversion.plan import ByteRange, Entry, InterleaveHeads, OutputFile, Plan
from smolexport.conversion.source_model import CALIBRATION_KEY, SourceModel
from smolexport.errors import UnsupportedError
from smolexport.model.spec import ModelSpec, Role, Tensor
from smolexport.quant import FORMATS
from smolexport_to_gguf import architectures, reading, schemes
from smolexport_to_gguf.container import Metadata, header_bytes, padding
from smolexport_to_gguf.imatrix import Importance, read_importance
from smolexport_to_gguf.imatrix import write_importance as write_importance
from smolexport_to_gguf.metadata import model_metadata, rope_factors
from smolexport_to_gguf.vocabulary import check_vocabulary, vocabulary_metadata, vocabulary_notes

FORMAT = "gguf"
SUFFIX = ".gguf"
FOLDER = False
DEFAULT = "q4_k_m"
OPTIONS: Mapping[str, str] = {"imatrix": "importance matrix of llama.cpp, a file; the same as --imatrix"}
SCHEMES, find_scheme, check = schemes.SCHEMES, schemes.find_scheme, architectures.check
describe, lint, recognises, weights = reading.describe, reading.lint, reading.recognises, reading.weights
replaceable = recognises


def plan(model: SourceModel, scheme: str, *, imatrix: str | None = None) -> Plan:
    """Decide every tensor and every key of the file.

    Args:
        model: a model whose spec `check` has passed.
        scheme: a name of `SCHEMES` or an alias.
        imatrix: file of an importance matrix of llama.cpp, in either form.

    Raises:
        UsageError: unknown scheme, or one that needs an importance matrix or does not allow one.
        FileFormatError: the importance matrix is damaged, or of another model.
        UnsupportedError: the tokenizer cannot be expressed; see `check_vocabulary`.
    """
    spec, tokenizer, chosen = model.spec, model.tokenizer, find_scheme(scheme)
    reasons = check_vocabulary(tokenizer, model.name)
    if reasons:
        raise UnsupportedError(f"the tokenizer cannot be exported to GGUF: {'; '.join(reasons)}")
    importance = read_importance(imatrix, chosen)
    chosen = replace(chosen, weighed=importance is not None)
    entries = _entries(spec, chosen, model.bits, importance)
    row = architectures.ROWS[spec.model_type]
    plain = Plan(FORMAT, row.name, chosen.name, entries)
    notes = [*_advice(spec, chosen, plain), *vocabulary_notes(tokenizer, model.name)]
    metadata = [*model_metadata(spec, chosen, model.name), *vocabulary_metadata(tokenizer)]
    if importance:
        notes += importance.notes(entries, chosen)
        metadata += importance.metadata()
    if chosen.name in portable.SCHEMES:
        notes.insert(0, portable.NOTE)
    if row.since:
        notes.append(f"needs llama.cpp of {row.since} or newer")
    if model.calibration:
        metadata.append((CALIBRATION_KEY, "string", model.calibration))
    return replace(plain, metadata=tuple(metadata), notes=tuple(notes), files=(_file(metadata, entries),))


def _entries(
    spec: ModelSpec, scheme: schemes.Scheme, bits: portable.Bits | None = None, importance: Importance | None = None
) -> tuple[Entry, ...]:
    pairs = architectures.ROWS[spec.model_type].pairs
    entries = []
    for tensor in spec.tensors():
        choice = scheme.choose(tensor, spec, bits)
        interleave = InterleaveHeads(spec.attention.head_dim) if pairs and tensor.role in (Role.Q, Role.K) else None
        columns = importance.of(tensor, choice.format, scheme) if importance else None
        name = architectures.output_name(tensor)
        entries.append(choice.entry(name, tensor, transform=interleave, importance=columns))
    factors = rope_factors(spec)
    if factors:
        entries.append(Entry("rope_freqs.weight", FORMATS["f32"], (len(factors),), values=factors))
    return tuple(entries)


def _file(metadata: Metadata, entries: tuple[Entry, ...]) -> OutputFile:
    header = header_bytes(metadata, ((e.name, e.shape, FORMATS[e.format.name]) for e in entries))
    *offsets, size = accumulate((e.nbytes + padding(e.nbytes) for e in entries), initial=len(header))
    ranges = (
        ByteRange(e.name, offset, e.format.row_bytes(e.shape[-1])) for e, offset in zip(entries, offsets, strict=True)
    )
    return OutputFile("", bytes(header), tuple(ranges), size)


def _advice(spec: ModelSpec, scheme: schemes.Scheme, made: Plan) -> list[str]:
    """If most matrices fall back: better schemes."""
    matrices = sum(e.is_matrix for e in made.entries)
    if len(made.fallbacks) * 2 < matrices:
        return []
    bits = {
        name: Plan(FORMAT, "", name, _entries(spec, SCHEMES[name])).bits_per_weight
        for name in ("q4_0", "iq4_nl", "q8_0", "f16")
    }
    better = schemes.better_schemes(scheme, made.bits_per_weight, bits)
    return [
        f"{scheme.name} falls back for {len(made.fallbacks)} of {matrices} matrices and has "
        f"{made.bits_per_weight:.2f} bits per weight; consider "
        + ", ".join(f"{name} ({bits[name]:.2f} bits)" for name in better)
    ]


def bit_choices(tensor: Tensor) -> tuple[int, ...]:
    """Bits that the scheme `auto-bits` can give `tensor`, most first: q8_0, q6_k where rows allow it, q5_0, q4_0."""
    if not tensor.is_matrix or not FORMATS["q4_0"].fits(tensor.columns):
        return ()
    return (8, 6, 5, 4) if FORMATS["q6_k"].fits(tensor.columns) else (8, 5, 4)

"""GGUF, the format of llama.cpp: check, plan, write, read back.

A few functions and a table; the driver calls them in this order: `check(spec)` says why llama.cpp could not run the
model, `plan(model, scheme)` decides every tensor, `output(plan, path)` takes the encoded rows, `weights(path)` decodes
them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from smolexport.conversion import portable
from smolexport.conversion.plan import Entry, InterleaveHeads, Plan
from smolexport.conversion.source_model import CALIBRATION_KEY, SourceModel
from smolexport.conversion.writer import ByteRange, Sink
from smolexport.errors import UnsupportedError
from smolexport.files import atomic_file, check_target, open_regular
from smolexport.model.spec import ModelSpec, Role, Tensor
from smolexport.quant import FORMATS
from smolexport_to_gguf import architectures
from smolexport_to_gguf.container import header_bytes, padding
from smolexport_to_gguf.description import describe
from smolexport_to_gguf.differences import vocabulary_notes
from smolexport_to_gguf.importance import Importance, read_importance, write_importance
from smolexport_to_gguf.lint import lint
from smolexport_to_gguf.metadata import model_metadata, rope_factors
from smolexport_to_gguf.reading import weights
from smolexport_to_gguf.schemes import SCHEMES, PortableScheme, Scheme, better_schemes, find_scheme
from smolexport_to_gguf.vocabulary import check_vocabulary, vocabulary_metadata

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
    "write_importance",
]

FORMAT = "gguf"
SUFFIX = ".gguf"
FOLDER = False
DEFAULT = "q4_k_m"
OPTIONS: dict[str, str] = {"imatrix": "importance matrix of llama.cpp, a file; the same as --imatrix"}

check = architectures.check


def recognises(path: Path) -> bool:
    """Whether `path` is a file that starts like GGUF."""
    try:
        with open_regular(path) as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def replaceable(path: Path) -> bool:
    """Whether `path` is an earlier output."""
    return recognises(path)


def plan(model: SourceModel, scheme: str, *, imatrix: str | None = None) -> Plan:
    """Decide every tensor and every key of the file.

    Args:
        model: a model whose spec `check` has passed.
        scheme: a name of `SCHEMES` or an alias.
        imatrix: file of an importance matrix of llama.cpp, in either form.

    Raises:
        UsageError: unknown scheme, or one that does not go with an importance matrix, or not without.
        FileFormatError: the importance matrix is damaged, or of another model.
        UnsupportedError: the tokenizer cannot be expressed; see `check_vocabulary`.
    """
    spec, tokenizer, chosen = model.spec, model.tokenizer, find_scheme(scheme)
    if isinstance(chosen, PortableScheme) and chosen.name == portable.AUTO_BITS:
        chosen = replace(chosen, bits=portable.decided(model.bits))
    reasons = check_vocabulary(tokenizer, model.name)
    if reasons:
        raise UnsupportedError(f"the tokenizer cannot be exported to GGUF: {'; '.join(reasons)}")
    importance = read_importance(imatrix, chosen)
    entries = _entries(spec, chosen, importance)
    row = architectures.ROWS[spec.model_type]
    plain = Plan(FORMAT, row.name, chosen.name, entries)
    notes = [*_advice(spec, chosen, plain), *vocabulary_notes(tokenizer, model.name)]
    keys = []
    if importance:
        notes += importance.notes(entries, chosen)
        keys = importance.metadata()
    if chosen.name in portable.SCHEMES:
        notes.insert(0, portable.NOTE)
    if row.since:
        notes.append(f"needs llama.cpp of {row.since} or newer")
    if model.calibration:
        keys.append((CALIBRATION_KEY, "string", model.calibration))
    metadata = (*model_metadata(spec, chosen, model.name), *vocabulary_metadata(tokenizer), *keys)
    return Plan(FORMAT, row.name, chosen.name, entries, metadata, tuple(notes))


def _entries(spec: ModelSpec, scheme: Scheme, importance: Importance | None = None) -> tuple[Entry, ...]:
    pairs = architectures.ROWS[spec.model_type].pairs
    entries = []
    for tensor in spec.tensors():
        form, wanted = scheme.choose(tensor, spec, importance is not None)
        reorder = InterleaveHeads(spec.attention.head_dim) if pairs and tensor.role in (Role.Q, Role.K) else None
        name, via = architectures.output_name(tensor), scheme.via(tensor)
        weights = importance.of(tensor, form, scheme) if importance else None
        entries.append(Entry(name, form, tensor.shape, tensor, wanted, reorder, via, importance=weights))
    factors = rope_factors(spec)
    if factors:
        entries.append(Entry("rope_freqs.weight", FORMATS["f32"], (len(factors),), values=factors))
    return tuple(entries)


def _advice(spec: ModelSpec, scheme: Scheme, made: Plan) -> list[str]:
    """When most matrices fall back, say what would serve better."""
    matrices = sum(e.is_matrix for e in made.entries)
    if len(made.fallbacks) * 2 < matrices:
        return []
    bits = {
        name: Plan(FORMAT, "", name, _entries(spec, SCHEMES[name])).bits_per_weight
        for name in ("q4_0", "iq4_nl", "q8_0", "f16")
    }
    better = ", ".join(f"{n} ({bits[n]:.2f} bits)" for n in better_schemes(scheme, made.bits_per_weight, bits))
    return [
        f"{scheme.name} falls back for {len(made.fallbacks)} of {matrices} matrices and comes to "
        f"{made.bits_per_weight:.2f} bits per weight; consider {better}"
    ]


def bit_choices(tensor: Tensor) -> tuple[int, ...]:
    """Bits that the scheme `auto-bits` can give `tensor`, most first: q8_0, q6_k where rows allow it, q5_0, q4_0."""
    if not tensor.is_matrix or not FORMATS["q4_0"].fits(tensor.columns):
        return ()
    return (8, 6, 5, 4) if FORMATS["q6_k"].fits(tensor.columns) else (8, 5, 4)


def size(plan: Plan) -> int:
    """Bytes of the file."""
    return len(_header(plan)) + sum(entry.nbytes + padding(entry.nbytes) for entry in plan.entries)


def _header(plan: Plan) -> bytearray:
    return header_bytes(plan.metadata, ((e.name, e.shape, FORMATS[e.format.name]) for e in plan.entries))


@contextmanager
def output(plan: Plan, path: Path, *, force: bool = False) -> Iterator[Sink]:
    """Open `path` for the plan's tensors; it appears whole, when the block ends, or not at all.

    Args:
        plan: what `plan` made.
        path: the target file.
        force: replace an existing file.

    Raises:
        OutputError: the target exists or cannot be written.
    """
    header = _header(plan)
    places, total = {}, len(header)
    for entry in plan.entries:
        places[entry.name] = (ByteRange(total, entry.format.row_bytes(entry.shape[-1])),)
        total += entry.nbytes + padding(entry.nbytes)
    check_target(path, total, force=force)
    with atomic_file(path, force=force) as file:
        file.write(header)
        header.clear()  # megabytes, with a vocabulary in it
        file.truncate(total)  # the padding reads as zeros
        yield Sink([path], [file], places)

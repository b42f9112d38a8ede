"""GGUF, the format of llama.cpp: check, plan, write, read back.

Four functions and a table; `smolexport.convert` calls them in this order:
`check(spec)` says why llama.cpp could not run the model, `plan(spec, tokenizer, scheme)` decides every tensor,
`write(plan, checkpoint, path)` streams it, `read_back(path)` decodes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smolexport.checkpoint import Checkpoint
from smolexport.errors import FileFormatError, UnsupportedError
from smolexport.output import atomic_file, check_target
from smolexport.plan import Entry, InterleaveHeads, Plan
from smolexport.quant import FORMATS
from smolexport.spec import ModelSpec, Role, Tensor
from smolexport.stream import encoded_chunks
from smolexport.tokenizer import TokenizerSpec
from smolexport_to_gguf import architectures
from smolexport_to_gguf.container import ALIGNMENT, GgufFile, header_bytes, padding, read_gguf
from smolexport_to_gguf.description import describe
from smolexport_to_gguf.metadata import model_metadata, rope_factors
from smolexport_to_gguf.schemes import SCHEMES, Scheme, better_schemes, find_scheme
from smolexport_to_gguf.vocabulary import check_vocabulary, vocabulary_metadata, vocabulary_notes

__all__ = [
    "DEFAULT",
    "FORMAT",
    "SCHEMES",
    "SUFFIX",
    "check",
    "describe",
    "find_scheme",
    "plan",
    "read_back",
    "recognises",
    "write",
]

FORMAT = "gguf"
SUFFIX = ".gguf"
DEFAULT = "q4_k_m"

check = architectures.check


def recognises(path: Path) -> bool:
    """Whether `path` is a file that starts like GGUF."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def plan(spec: ModelSpec, tokenizer: TokenizerSpec, scheme: str, *, name: str) -> Plan:
    """Decide every tensor and every key of the file.

    Args:
        spec: a model that `check` has passed.
        tokenizer: its tokenizer.
        scheme: a name of `SCHEMES` or an alias.
        name: what people call the model.

    Raises:
        UsageError: unknown scheme.
        UnsupportedError: the tokenizer cannot be expressed; see `check_vocabulary`.
    """
    chosen = find_scheme(scheme)
    reasons = check_vocabulary(tokenizer)
    if reasons:
        raise UnsupportedError(f"the tokenizer cannot be exported to GGUF: {'; '.join(reasons)}")
    entries = _entries(spec, chosen)
    row = architectures.ROWS[spec.model_type]
    plain = Plan(FORMAT, row.name, chosen.name, entries)
    notes = [*_advice(spec, chosen, plain), *vocabulary_notes(tokenizer)]
    if row.since:
        notes.append(f"needs llama.cpp of {row.since} or newer")
    metadata = (*model_metadata(spec, chosen, name), *vocabulary_metadata(tokenizer))
    return Plan(FORMAT, row.name, chosen.name, entries, metadata, tuple(notes))


def _entries(spec: ModelSpec, scheme: Scheme) -> tuple[Entry, ...]:
    pairs = architectures.ROWS[spec.model_type].pairs
    entries = []
    for tensor in spec.tensors():
        form, wanted = scheme.choose(tensor, spec)
        reorder = InterleaveHeads(spec.head_dim) if pairs and tensor.role in (Role.Q, Role.K) else None
        entries.append(Entry(architectures.output_name(tensor), form, tensor.shape, tensor, wanted, reorder))
    factors = rope_factors(spec)
    if factors:
        entries.append(Entry("rope_freqs.weight", FORMATS["f32"], (len(factors),), values=factors))
    return tuple(entries)


def _advice(spec: ModelSpec, scheme: Scheme, made: Plan) -> list[str]:
    """When most matrices fall back, say what would serve better."""
    matrices = sum(len(e.shape) == 2 for e in made.entries)
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


def write(
    plan: Plan,
    checkpoint: Checkpoint,
    path: Path,
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Stream the plan's tensors into `path`; it appears whole or not at all.

    Args:
        plan: what `plan` made for this checkpoint.
        checkpoint: where the weights come from.
        path: the target file.
        threads: encoding threads; None = the processors that may be used.
        force: replace an existing file.
        progress: called with the bytes of each chunk written.

    Returns:
        The files written.

    Raises:
        OutputError: the target exists or cannot be written.
        TensorError: a weight is not finite.
    """
    header = header_bytes(plan.metadata, ((e.name, e.shape, e.format) for e in plan.entries))
    total = len(header) + sum(e.nbytes + padding(e.nbytes) for e in plan.entries)
    check_target(path, total, force=force)
    with atomic_file(path, force=force) as file:
        file.write(header)
        done, current = 0, None
        for entry, chunk in encoded_chunks(checkpoint, plan.entries, threads):
            if current is not entry:
                file.write(bytes(-done % ALIGNMENT))
                done, current = 0, entry
            file.write(chunk.reshape(-1).data)
            done += chunk.nbytes
            if progress:
                progress(chunk.nbytes)
        file.write(bytes(-done % ALIGNMENT))
    return [path]


def read_back(path: Path, spec: ModelSpec) -> Iterator[tuple[Tensor, NDArray[np.float32]]]:
    """Decode every tensor of the checkpoint from `path`, in the checkpoint's own row order, one at a time.

    Args:
        path: a file that `write` made for a model of this `spec`.
        spec: the model.

    Raises:
        FileFormatError: damaged, or the tensors are not those of `spec`.
    """
    file = read_gguf(path)
    pairs = architectures.ROWS[spec.model_type].pairs
    for tensor in spec.tensors():
        values = _decoded(file, architectures.output_name(tensor), tensor.shape)
        if pairs and tensor.role in (Role.Q, Role.K):
            values = InterleaveHeads(spec.head_dim).undo(values)
        yield tensor, values.reshape(tensor.shape)


def _decoded(file: GgufFile, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    info = file.tensors.get(name)
    if info is None or info.shape != shape:
        found = "is missing" if info is None else f"has shape {list(info.shape)}"
        raise FileFormatError(f"{file.path}: tensor {name} {found}; the model asks for {list(shape)}")
    columns = shape[-1]
    raw = np.fromfile(file.path, np.uint8, info.nbytes, offset=info.offset)
    decoded = info.format.decode(raw.reshape(-1, info.format.row_bytes(columns)), columns)
    return decoded if len(shape) == 2 else decoded.reshape(-1, 1)

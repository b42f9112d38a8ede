"""Candidates from paths: the runtime of each file and the facts about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smolexport import plugins
from smolexport.errors import UsageError
from smolexport.model.checkpoint import open_checkpoint
from smolexport.model.source_files import refuse_changes
from smolexport.parity.calibration_record import read_calibration_errors, read_calibration_record
from smolexport.parity.inputs import Candidate, Origin
from smolexport.run.session import Runtime, TextCodec

DTYPES = ("bf16", "f32")


def reference(folder: Path, dtype: str = "bf16", *, ignore_config: Collection[str] = ()) -> Candidate:
    """The checkpoint in `folder`, run by the runtime of checkpoints in `dtype`.

    Raises:
        UsageError: the dtype is not supported.
        CheckpointError: the checkpoint is damaged or not supported.
        MissingDependencyError: torch or transformers is not installed.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: not supported; use {' or '.join(DTYPES)}")
    checkpoint = open_checkpoint(folder, ignore_config=ignore_config)
    return Candidate(
        path=folder,
        format="checkpoint",
        scheme=dtype,
        runtime=plugins.checkpoint_runtime(),
        bytes=checkpoint.nbytes,
        bits_per_weight=8 * checkpoint.nbytes / sum(t.size for t in checkpoint.stored),
        options={"dtype": dtype},
        origin=Origin(checkpoint.spec, lambda: _codec(folder, checkpoint.spec.vocab_size)),
        weights=lambda: checkpoint.stored,
        notes=checkpoint.notes,
        unchanged=partial(refuse_changes, folder, checkpoint.stamps),
    )


def _codec(folder: Path, vocab_size: int) -> TextCodec:
    from smolexport.tokenizer import open_tokenizer, read_tokenizer

    return open_tokenizer(folder, read_tokenizer(folder, vocab_size))


def exported(
    paths: Sequence[Path], options: Mapping[str, Any] | None = None, runtimes: Sequence[str] = ()
) -> list[Candidate]:
    """Exported files or folders, each with the runtime of its format, or with all of `runtimes` that can run it.

    Args:
        paths: exported files or folders.
        options: further options of the runtimes' `open`; each goes to the runtimes that have it.
        runtimes: names of runtimes to use instead of the first installed one.

    Raises:
        FileFormatError: the file does not exist, is damaged, is a checkpoint, or has an unknown format.
        UsageError: no runtime has an option, or a value is not valid; a runtime does not exist or can run none of the
            files.
        MissingDependencyError: a runtime is not installed.
    """
    pairs = [(path, runtime) for path in paths for runtime in _runtimes_for(path, runtimes)]
    for name in runtimes:
        runtime_asked = plugins.adapter(plugins.find_runtime(name))
        if runtime_asked not in [runtime for _, runtime in pairs]:
            raise UsageError(f"--runtime {name}: no file has the format '{runtime_asked.READS}' that it reads")
    known = {runtime.NAME: plugins.known_options(runtime.open) for _, runtime in pairs}
    for key in options or {}:
        if not any(key in names for names in known.values()):
            raise UsageError(f"--set {key}: {_available_options(known)}")
    found = []
    for path, runtime in pairs:
        own = {key: value for key, value in (options or {}).items() if key in known[runtime.NAME]}
        converter = plugins.converter_for(path)
        about = converter.describe(path)
        record, unreadable = read_calibration_record(about.metadata)
        errors, damaged = read_calibration_errors(path, record) if record else ((), "")
        found.append(
            Candidate(
                path=path,
                format=about.format,
                scheme=about.scheme,
                runtime=runtime,
                bytes=about.bytes,
                bits_per_weight=about.bits_per_weight,
                options=plugins.checked_options(runtime.open, own, runtime.NAME),
                # the weights read back are those of the folder's first model
                weights=None if "graph" in own else partial(converter.weights, path),
                calibration=record,
                calibration_errors=errors,
                notes=tuple(filter(None, (unreadable, damaged))),
            )
        )
    return found


def _runtimes_for(path: Path, names: Sequence[str]) -> list[Runtime]:
    """The named runtimes that can run `path`, each once; without any, the default one."""
    kind = plugins.converter_for(path).FORMAT
    found = dict.fromkeys(plugins.find_runtime(name) for name in names)
    return [plugins.runtime(name) for name in found if kind == plugins.adapter(name).READS] or [
        plugins.runtime_for(path)
    ]


def _available_options(known: Mapping[str, Sequence[str]]) -> str:
    """The options of each runtime, for messages."""
    if len(known) == 1:
        [(owner, names)] = known.items()
        return f"{owner} has no such option; it has {', '.join(names) or 'none'}"
    each = "; ".join(f"{owner} has {', '.join(names) or 'none'}" for owner, names in known.items())
    return f"no runtime has such an option; {each}"

"""From paths to things that can be compared: which runtime plays them, and what they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smolexport import plugins
from smolexport.checkpoint import open_checkpoint
from smolexport.errors import UsageError
from smolexport.parity.calibrated import read_record, read_steps
from smolexport.parity.inputs import Candidate, Origin
from smolexport.runtime import Runtime, TextCodec
from smolexport.source_files import refuse_changes

__all__ = ["exported", "reference"]

DTYPES = ("bf16", "f32")


def reference(folder: Path, dtype: str = "bf16", *, ignore_config: Collection[str] = ()) -> Candidate:
    """The checkpoint in `folder`, played by the runtime of checkpoints in `dtype`.

    Raises:
        UsageError: another dtype.
        CheckpointError: the checkpoint is damaged or not understood.
        MissingDependencyError: torch or transformers is not installed.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: the reference runs in {' or '.join(DTYPES)}")
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
    """Exported files or folders, each with the runtime of its format, or with all of `runtimes` that play it.

    Args:
        paths: what to compare.
        options: further options of the runtimes' `open`; each goes to those that know it.
        runtimes: names of runtimes to take for what they play, instead of the first that is there.

    Raises:
        FileFormatError: no such file, damaged, a checkpoint, or of no known format.
        UsageError: an option that none of the runtimes knows, or a value that it does not take; a name of a runtime
            that does not exist or plays none of the files.
        MissingDependencyError: a runtime is not installed.
    """
    pairs = [(path, runtime) for path in paths for runtime in _players(path, runtimes)]
    for name in runtimes:
        player = plugins.adapter(plugins.find_runtime(name))
        if player not in [runtime for _, runtime in pairs]:
            raise UsageError(f"--runtime {name}: plays the format '{player.READS}', which none of the files has")
    known = {runtime.NAME: plugins.known_options(runtime.open) for _, runtime in pairs}
    for key in options or {}:
        if not any(key in names for names in known.values()):
            raise UsageError(f"--set {key}: {_what_there_is(known)}")
    found = []
    for path, runtime in pairs:
        own = {key: value for key, value in (options or {}).items() if key in known[runtime.NAME]}
        converter = plugins.converter_for(path)
        about = converter.describe(path)
        record, torn = read_record(about.metadata)
        steps, damaged = read_steps(path, record) if record else ((), "")
        found.append(
            Candidate(
                path=path,
                format=about.format,
                scheme=about.scheme,
                runtime=runtime,
                bytes=about.bytes,
                bits_per_weight=about.bits_per_weight,
                options=plugins.checked_options(runtime.open, own, runtime.NAME),
                # the weights that are read back are those of a folder's first model
                weights=None if "graph" in own else partial(converter.weights, path),
                calibration=record,
                steps=steps,
                notes=tuple(filter(None, (torn, damaged))),
            )
        )
    return found


def _players(path: Path, names: Sequence[str]) -> list[Runtime]:
    """Those of the named runtimes that play `path`, each once; else the one that is taken without being asked."""
    kind = plugins.converter_for(path).FORMAT
    found = dict.fromkeys(plugins.find_runtime(name) for name in names)
    return [plugins.runtime(name) for name in found if kind == plugins.adapter(name).READS] or [
        plugins.runtime_for(path)
    ]


def _what_there_is(known: Mapping[str, Sequence[str]]) -> str:
    """Names of options, by runtime, in words."""
    if len(known) == 1:
        [(owner, names)] = known.items()
        return f"{owner} has no such option; it has {', '.join(names) or 'none'}"
    each = "; ".join(f"{owner} has {', '.join(names) or 'none'}" for owner, names in known.items())
    return f"none of the runtimes has such an option; {each}"

"""From paths to things that can be compared: which runtime plays them, and what they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from smolexport import plugins
from smolexport.checkpoint import open_checkpoint
from smolexport.errors import UsageError
from smolexport.parity.results import Candidate

__all__ = ["exported", "reference"]

DTYPES = ("bf16", "f32")


def reference(folder: Path, dtype: str = "bf16", *, ignore_config: Collection[str] = ()) -> Candidate:
    """The checkpoint in `folder`, played by torch in `dtype`.

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
        runtime=plugins.runtime("torch"),
        bytes=checkpoint.nbytes,
        bits_per_weight=8 * checkpoint.nbytes / sum(t.size for t in checkpoint.stored),
        options={"dtype": dtype},
    )


def exported(paths: Sequence[Path], options: Mapping[str, Any] | None = None) -> list[Candidate]:
    """Exported files or folders, each with the runtime of its format.

    Args:
        paths: what to compare.
        options: further options of the runtimes' `open`; each goes to those that know it.

    Raises:
        FileFormatError: no such file, damaged, a checkpoint, or of no known format.
        UsageError: an option that none of the runtimes knows, or a value that it does not take.
        MissingDependencyError: a runtime is not installed.
    """
    formats = [plugins.converter_for(path) for path in paths]
    runtimes = [plugins.runtime_for(path) for path in paths]
    known = {runtime.NAME: plugins.known_options(runtime.open) for runtime in runtimes}
    for key in options or {}:
        if not any(key in names for names in known.values()):
            raise UsageError(f"--set {key}: {_what_there_is(known)}")
    found = []
    for path, module, runtime in zip(paths, formats, runtimes, strict=True):
        own = {key: value for key, value in (options or {}).items() if key in known[runtime.NAME]}
        about = module.describe(path)
        found.append(
            Candidate(
                path=path,
                format=about.format,
                scheme=about.scheme,
                runtime=runtime,
                bytes=about.bytes,
                bits_per_weight=about.bits_per_weight,
                options=plugins.checked_options(runtime.open, own, runtime.NAME),
            )
        )
    return found


def _what_there_is(known: Mapping[str, Sequence[str]]) -> str:
    """Names of options, by runtime, in words."""
    if len(known) == 1:
        [(owner, names)] = known.items()
        return f"{owner} has no such option; it has {', '.join(names) or 'none'}"
    each = "; ".join(f"{owner} has {', '.join(names) or 'none'}" for owner, names in known.items())
    return f"none of the runtimes has such an option; {each}"

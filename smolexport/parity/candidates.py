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
        FileFormatError: no such file, damaged, or of no known format.
        UsageError: an option that none of the runtimes knows, or a value that it does not take.
        MissingDependencyError: a runtime is not installed.
    """
    runtimes = [plugins.runtime_for(path) for path in paths]
    known = [plugins.known_options(runtime.open) for runtime in runtimes]
    for key in options or {}:
        if not any(key in names for names in known):
            some = sorted(set().union(*known))
            owners = ", ".join(dict.fromkeys(runtime.NAME for runtime in runtimes))
            raise UsageError(f"--set {key}: {owners} has no such option; it has {', '.join(some) or 'none'}")
    found = []
    for path, runtime, names in zip(paths, runtimes, known, strict=True):
        own = {key: value for key, value in (options or {}).items() if key in names}
        about = plugins.converter_for(path).describe(path)
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

"""From paths to things that can be compared: which runtime plays them, and what they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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


def exported(path: Path, options: Mapping[str, Any] | None = None) -> Candidate:
    """The exported file `path` with the runtime of its format, to be opened with `options`.

    Raises:
        FileFormatError: no such file, damaged, or of no known format.
        UsageError: an option that the runtime does not know.
        MissingDependencyError: its runtime is not installed.
    """
    found, runtime = plugins.converter_for(path).describe(path), plugins.runtime_for(path)
    return Candidate(
        path=path,
        format=found.format,
        scheme=found.scheme,
        runtime=runtime,
        bytes=found.bytes,
        bits_per_weight=found.bits_per_weight,
        options=plugins.checked_options(runtime, options or {}),
    )

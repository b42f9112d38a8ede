"""The functions of `import smolexport` that need a runtime or an exported file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from smolexport.conversion.inspect import FileInfo
    from smolexport.model.spec import ModelSpec, Tensor
    from smolexport.parity.inputs import Settings
    from smolexport.parity.results import Comparison
    from smolexport.parity.thresholds import Thresholds
    from smolexport.run.generate import Generation
    from smolexport.run.sampling import Sampling


def compare(
    checkpoint: str | Path,
    files: Sequence[str | Path],
    *,
    text: str | None = None,
    dtype: str = "bf16",
    settings: Settings | None = None,
    thresholds: Thresholds | None = None,
    options: Mapping[str, Any] | None = None,
    runtimes: Sequence[str] = (),
    ignore_config: Collection[str] = (),
    revision: str | None = None,
    token: str | None = None,
    statistics: str | Path | None = None,
) -> Comparison:
    """Compare exported files with their checkpoint.

    Args:
        checkpoint: folder, hub id, or `demo`.
        files: exported files of it.
        text: the text to score; None = the demo's held-out text.
        dtype: arithmetic of the reference, `bf16` or `f32`.
        settings: what to measure.
        thresholds: what each file must meet; see `Comparison.passed`.
        options: options of the files' runtimes, each for those that have it, e.g. `{"kv_type": "f32"}` for llama.cpp.
        runtimes: names of runtimes; each file runs on all of them that can run it.  Empty = the first installed one.
        ignore_config: keys of config.json to treat as inert.
        revision: hub revision.
        token: hub token.
        statistics: folder of the statistics that the files were calibrated with, to detect scored tokens in its text.

    Raises:
        SmolexportError: a file or the checkpoint cannot be read, a runtime is missing, or a file was calibrated on the
            text to be scored.
    """
    from smolexport.calibration.statistics import open_statistics
    from smolexport.demo import demo_text
    from smolexport.model.checkpoint import find_checkpoint, open_checkpoint
    from smolexport.parity.candidates import exported, reference
    from smolexport.parity.compare import compare as run

    candidates = exported([Path(f) for f in files], options, runtimes)
    words = demo_text() if text is None else text
    folder = find_checkpoint(checkpoint, revision=revision, token=token)
    base = reference(folder, dtype, ignore_config=ignore_config)
    known = None
    if statistics is not None:
        known = open_statistics(Path(statistics), open_checkpoint(folder, ignore_config=ignore_config))
    return run(base, candidates, text=words, settings=settings, thresholds=thresholds, statistics=known)


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    threads: int | None = None,
    runtime: str | None = None,
) -> Generation:
    """Continue `prompt` with an exported file or a checkpoint on its own runtime.

    Args:
        model: exported file, checkpoint folder, hub id, or `demo`.
        prompt: text to continue.
        max_tokens: most tokens to generate.
        sampling: how tokens are drawn; None = greedy.
        threads: None = one per physical core.
        runtime: name of the runtime; None = the first installed one for the format.

    Raises:
        SmolexportError: the model cannot be read or its runtime is missing.
    """
    from smolexport.plugins import locate
    from smolexport.run.generate import generate as run

    path, player = locate(model, runtime)
    with player.open(path, threads=threads) as session:
        return run(session, prompt, sampling=sampling, max_tokens=max_tokens)


def inspect(path: str | Path) -> FileInfo:
    """Metadata and tensors of an exported file, from its header.  Raises FileFormatError."""
    from smolexport.plugins import converter_for

    return converter_for(Path(path)).describe(Path(path))


def read_back(path: str | Path, spec: ModelSpec) -> Iterator[tuple[Tensor, NDArray[np.float32]]]:
    """The decoded weights of an exported file, with the checkpoint's names, shapes and order of rows, one at a time.

    Raises FileFormatError, also if the tensors are not those of `spec`, e.g. `open_checkpoint(folder).spec`.
    """
    from smolexport.model import weights
    from smolexport.plugins import converter_for

    return weights.read_back(converter_for(Path(path)).weights(Path(path)), Path(path), spec)


def fingerprint(path: str | Path, *, threads: int = 1) -> str:
    """The weights fingerprint, equal for two files exactly when all decoded weights are; raises FileFormatError."""
    from smolexport.model import weights
    from smolexport.plugins import converter_for

    return weights.fingerprint(converter_for(Path(path)).weights(Path(path)), threads)

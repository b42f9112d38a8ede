"""The verbs of the package that need a runtime or a file: compare, generate, inspect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smolexport.description import Description
    from smolexport.generation import Generation, Sampling
    from smolexport.parity.results import Comparison, Settings, Thresholds

__all__ = ["compare", "generate", "inspect"]


def compare(
    checkpoint: str | Path,
    files: Sequence[str | Path],
    *,
    text: str | None = None,
    dtype: str = "bf16",
    settings: Settings | None = None,
    thresholds: Thresholds | None = None,
) -> Comparison:
    """Hold exported files against their checkpoint.

    Args:
        checkpoint: folder, hub id, or `demo`.
        files: exported files of it.
        text: what is scored; None = the demo's held-out text.
        dtype: arithmetic of the reference, `bf16` or `f32`.
        settings: how much is measured.
        thresholds: what each file must reach; see `Comparison.passed`.

    Raises:
        SmolexportError: a file or the checkpoint cannot be read, or a runtime is missing.
    """
    from smolexport.checkpoint import find_checkpoint
    from smolexport.demo import demo_text
    from smolexport.parity.candidates import exported, reference
    from smolexport.parity.compare import compare as run

    candidates = [exported(Path(f)) for f in files]
    words = demo_text() if text is None else text
    base = reference(find_checkpoint(checkpoint), dtype)
    return run(base, candidates, text=words, settings=settings, thresholds=thresholds)


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    threads: int | None = None,
) -> Generation:
    """Continue `prompt` with an exported file or a checkpoint on its own runtime.

    Args:
        model: exported file, checkpoint folder, hub id, or `demo`.
        prompt: text to continue.
        max_tokens: most tokens to generate.
        sampling: how tokens are drawn; None = greedy.
        threads: None = one per physical core.

    Raises:
        SmolexportError: the model cannot be read or its runtime is missing.
    """
    from smolexport.checkpoint import find_checkpoint
    from smolexport.generation import generate as run
    from smolexport.plugins import runtime_for

    path = Path(model)
    path = path if path.is_file() else find_checkpoint(model)
    with runtime_for(path).open(path, threads=threads) as session:
        return run(session, prompt, sampling=sampling, max_tokens=max_tokens)


def inspect(path: str | Path) -> Description:
    """What an exported file holds, from its header.

    Raises:
        FileFormatError: damaged or of no known format.
    """
    from smolexport.plugins import converter_for

    return converter_for(Path(path)).describe(Path(path))

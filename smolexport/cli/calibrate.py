"""`smolexport calibrate`: gather statistics for calibrated quantization, once for all formats and methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolexport.cli import options
from smolexport.cli.streams import print_json, progress_bar, say

if TYPE_CHECKING:
    from smolexport.calibration.collect import Collection
    from smolexport.calibration.statistics import Statistics
    from smolexport.model.checkpoint import Checkpoint

LARGE_SHARE = 0.1  # of the trace of a Hessian, above which a single token is worth a note


@click.command("calibrate", short_help="Gather statistics for calibrated quantization.")
@options.checkpoint
@click.option(
    "--text", "texts", metavar="FILE", type=options.given_path, multiple=True,
    help="Text (.txt and others), a text or messages per line (.jsonl), token ids (.npy, .json); repeatable.",
)  # fmt: skip
@click.option(
    "--out", "-o", metavar="STATS", type=options.given_path, required=True,
    help="Folder for the statistics; created if missing.",
)  # fmt: skip
@click.option("--tokens", default=65536, type=options.Integer(min=4), help="Most tokens in all windows together.")
@click.option("--window", default=512, type=options.Integer(min=4), help="Tokens per window.")
@click.option(
    "--seed", default=0, type=options.Integer(min=0, max=2**31),
    help="Seed for the order of the windows, and for the text that the model writes.",
)  # fmt: skip
@click.option(
    "--imatrix", metavar="FILE", type=options.given_path, help="Also write llama.cpp's importance matrix to FILE."
)
@click.option("--force", "-f", is_flag=True, help="Replace statistics made with other options, and FILE.")
@options.threads
@options.source
@options.json
def command(
    checkpoint: str, texts: tuple[Path, ...], out: Path, imatrix: Path | None, force: bool, json: bool, **rest: Any
) -> None:
    """Gather statistics of the inputs of each matrix while the model reads text: once, for all formats and methods.

    Runs the original in float32 one layer at a time, so that a model of any size fits: memory holds one layer and its
    largest Hessian. Needs PyTorch (extra: torch). May be killed at any time: the same command resumes where it stopped.
    Prints the folder, which is what --stats of the export commands takes.

    Choose text of the kind that the model will be used on, and never the text that it is evaluated on; 30 to 130
    thousand tokens are enough. Large files are sampled evenly from start to end.

    Without --text the model writes its own, at temperature 1 from random first tokens: almost as good for a model that
    writes well. A model of more than 1 GB in float32 is read from disk again for every token, which takes hours: give
    it a text.

    \b
    smolexport calibrate ./model --text book.txt --text chats.jsonl -o stats
    smolexport calibrate demo -o stats --imatrix demo.imatrix.gguf
    """
    from smolexport.calibration import collect
    from smolexport.files import check_target
    from smolexport.heap import share_heap

    if imatrix is not None:
        check_target(imatrix, 0, force=force, option="--imatrix")
    share_heap()
    found, opened = _gathered(checkpoint, out, texts=texts, force=force, **rest)
    if imatrix is not None:
        collect.write_importance(found, opened, imatrix, force=force)
        say(f"wrote {imatrix}")
    if json:
        print_json(_facts(found))
    else:
        click.echo(str(found.folder))


def _gathered(
    checkpoint: str,
    out: Path,
    *,
    texts: tuple[Path, ...],
    tokens: int,
    ignore_config: tuple[str, ...],
    revision: str | None,
    token: str | None,
    **rest: Any,
) -> tuple[Statistics, Checkpoint]:
    """The statistics, gathered with bars and notes, and their checkpoint."""
    from smolexport.calibration import collect
    from smolexport.model.checkpoint import find_checkpoint, open_checkpoint

    folder = find_checkpoint(checkpoint, revision=revision, token=token)
    opened = open_checkpoint(folder, ignore_config=ignore_config)
    label = "reading" if texts else "the model writes"
    with progress_bar(label, tokens * max(1, len(texts)), unit="tokens") as advance:
        job = collect.open_collection(opened, out, texts=texts, tokens=tokens, progress=advance, **rest)
    _describe(job)
    with progress_bar("gathering", job.manifest.layers + 1, unit="layers") as advance:
        found = collect.collect(job, advance)
    _warn(found, job)
    return found, opened


def _describe(job: Collection) -> None:
    m = job.manifest
    names = ", ".join(f"{source.name} ({source.tokens:,} tokens)" for source in m.sources)
    say(f"{m.windows} windows of {m.window} tokens from {names}")
    if m.tokens < m.asked // m.window * m.window:
        say(f"note: that is {m.tokens:,} tokens of the {m.asked:,} requested; more text would be better")
    if job.done:
        say(f"{job.folder} already holds these statistics; nothing to do")
    elif job.layers_done:
        say(f"resuming after {job.layers_done} of {m.layers} layers")


def _warn(found: Statistics, job: Collection) -> None:
    """Note the inputs dominated by a single token: their Hessians hold little about the others."""
    seen = []
    for tensor in job.checkpoint.spec.tensors():
        if tensor.layer is not None and tensor.is_matrix:
            share = found.largest_share(tensor)
            if share > LARGE_SHARE:
                seen.append(f"{tensor.name} ({share:.0%})")
    if seen:
        more = f" and {len(seen) - 3} more" if len(seen) > 3 else ""
        say(f"note: a single token dominates the input of {', '.join(seen[:3])}{more}; more text would help")


def _facts(found: Statistics) -> dict[str, object]:
    m = found.manifest
    return {
        "path": str(found.folder),
        "checkpoint": m.checkpoint,
        "method": m.method,
        "sources": [{"name": s.name, "sha256": s.sha256, "tokens": s.tokens} for s in m.sources],
        **{key: getattr(m, key) for key in ("tokens", "windows", "window", "seed", "layers")},
        "versions": dict(m.versions),
        "bytes": sum(path.stat().st_size for path in found.folder.iterdir()),
    }

"""`smolexport calibrate`: gather what each matrix of a checkpoint reads, once for all formats and methods."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolexport.cli.options import (
    Integer,
    checkpoint_argument,
    given_path,
    json_option,
    print_json,
    progress_bar,
    say,
    source_options,
    threads_option,
)

if TYPE_CHECKING:
    from smolexport.calibration.collect import Collection
    from smolexport.calibration.statistics import Statistics
    from smolexport.model.checkpoint import Checkpoint

LARGE_SHARE = 0.1  # of the trace of a Hessian, above which one token is told of


@click.command("calibrate", short_help="Gather statistics for calibrated quantization.")
@checkpoint_argument
@click.option(
    "--text", "texts", metavar="FILE", type=given_path, multiple=True,
    help="Text (.txt and others), a text or messages a line (.jsonl), token ids (.npy, .json); repeatable.",
)  # fmt: skip
@click.option(
    "--out", "-o", metavar="STATS", type=given_path, required=True, help="Folder for the statistics; made when missing."
)
@click.option("--tokens", default=65536, type=Integer(min=4), help="Most tokens in all windows.")
@click.option("--window", default=512, type=Integer(min=4), help="Tokens that the model sees at a time.")
@click.option("--seed", default=0, type=Integer(min=0, max=2**31), help="Of the order of windows, and of its own text.")
@click.option("--imatrix", metavar="FILE", type=given_path, help="Write llama.cpp's importance matrix to FILE too.")
@click.option("--force", "-f", is_flag=True, help="Replace statistics that were made otherwise, and FILE.")
@threads_option
@source_options
@json_option
def command(
    checkpoint: str,
    texts: tuple[Path, ...],
    out: Path,
    tokens: int,
    window: int,
    seed: int,
    imatrix: Path | None,
    force: bool,
    threads: int | None,
    json: bool,
    **source: Any,
) -> None:
    """Gather what each matrix of a checkpoint reads while it reads text: once, for all formats and methods.

    Runs the original in float32 one layer at a time, so that a model of any size fits: what is in memory is one layer
    and its largest Hessian. Needs PyTorch (extra: torch). May be killed at any time: the same line goes on where it
    stopped. Prints the folder, which then serves --stats of the exports.

    Take text of the kind that the model is for, and never the text that it is judged by: some 30 to 130 thousand
    tokens do. Of large files pieces from all over them are taken.

    Without --text the model writes its own, at temperature 1 from random first tokens: nearly as good for a model that
    writes well. A model of more than 1 GB in float32 is read again for every token, which takes hours: give it a text.

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
    opened = _opened(checkpoint, **source)
    with _reading(len(texts), tokens) as advance:
        job = collect.open_collection(
            opened, out, texts=texts, tokens=tokens, window=window, seed=seed, threads=threads, force=force,
            progress=advance,
        )  # fmt: skip
    _tell(job)
    with progress_bar("gathering", job.manifest.layers + 1, unit="layers") as advance:
        found = collect.collect(job, advance)
    _warn(found, job)
    if imatrix is not None:
        collect.write_importance(found, opened, imatrix, force=force)
        say(f"wrote {imatrix}")
    _show(found, json)


def _opened(checkpoint: str, ignore_config: tuple[str, ...], revision: str | None, token: str | None) -> Checkpoint:
    from smolexport.model.checkpoint import find_checkpoint, open_checkpoint

    return open_checkpoint(find_checkpoint(checkpoint, revision=revision, token=token), ignore_config=ignore_config)


def _reading(texts: int, tokens: int) -> AbstractContextManager[Callable[[int], None]]:
    return progress_bar("reading" if texts else "the model writes", tokens * max(1, texts), unit="tokens")


def _tell(job: Collection) -> None:
    m = job.manifest
    names = ", ".join(f"{source.name} ({source.tokens:,} tokens)" for source in m.sources)
    say(f"{m.windows} windows of {m.window} tokens from {names}")
    if m.tokens < m.asked // m.window * m.window:
        say(f"note: that is {m.tokens:,} tokens, less than the {m.asked:,} asked for; more text would serve better")
    if job.done:
        say(f"{job.folder} holds these statistics already; nothing is left to do")
    elif job.layers_done:
        say(f"goes on after {job.layers_done} of {m.layers} layers")


def _warn(found: Statistics, job: Collection) -> None:
    """Tell of inputs of which a single token makes much: their Hessians say little about the others."""
    seen = []
    for tensor in job.checkpoint.spec.tensors():
        if tensor.layer is not None and tensor.is_matrix:
            share = found.largest_share(tensor)
            if share > LARGE_SHARE:
                seen.append(f"{tensor.name} ({share:.0%})")
    if seen:
        more = f" and {len(seen) - 3} more" if len(seen) > 3 else ""
        say(f"note: one token makes much of what is read by {', '.join(seen[:3])}{more}; more text would help")


def _show(found: Statistics, json: bool) -> None:
    if json:
        print_json(_facts(found))
    else:
        click.echo(str(found.folder))


def _facts(found: Statistics) -> dict[str, object]:
    m = found.manifest
    return {
        "path": str(found.folder),
        "checkpoint": m.checkpoint,
        "method": m.method,
        "sources": [{"name": s.name, "sha256": s.sha256, "tokens": s.tokens} for s in m.sources],
        "tokens": m.tokens,
        "windows": m.windows,
        "window": m.window,
        "seed": m.seed,
        "layers": m.layers,
        "versions": dict(m.versions),
        "bytes": sum(path.stat().st_size for path in found.folder.iterdir()),
    }

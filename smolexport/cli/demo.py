"""`smolexport demo`: the main job on the embedded model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolexport.cli.options import Json, Threads, print_json, progress_bar, say

if TYPE_CHECKING:
    from smolexport.parity.results import Comparison

__all__ = ["command"]

SCHEMES = ("q8_0", "q4_k_m")
PROMPT = "The old man opened the door and"
LIMITS = {"q8_0": (0.001, 0.98), "q4_k_m": (0.01, 0.92)}


def command(
    path: Annotated[bool, typer.Option("--path", help="Only print the folder of the embedded checkpoint.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep the exported files in this folder.")] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace existing files there.")] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Export the embedded demo model, play the files on their runtimes, compare them with bf16.

    Needs no network. Without torch or llama.cpp installed it exports and says what is missing for the rest.
    """
    from smolexport.demo import demo_checkpoint

    if path:
        typer.echo(str(demo_checkpoint()))
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="smolexport-demo-") as scratch:
        folder = out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        files = [_export(scheme, folder, threads, force=out is None or force) for scheme in SCHEMES]
        lacking = _lacking()
        if lacking:
            kept = f"in {out}" if out else "into a temporary folder (keep them with -o FOLDER)"
            say(f"exported {kept}; to play and compare the files install the runtimes:\n  " + "\n  ".join(lacking))
            if json:
                print_json({"candidates": [], "missing": lacking, "passed": None})
            return
        result = _compare(files, threads, quiet=json)
        verdicts = _verdicts(result)
        if json:
            from smolexport.parity.report import to_json

            print_json({**to_json(result), "passed": not verdicts})
        else:
            _show(result, files, threads)
        for line in verdicts:
            say(line)
    if verdicts:
        raise typer.Exit(1)


def _export(scheme: str, folder: Path, threads: int | None, *, force: bool) -> Path:
    from smolexport import convert
    from smolexport.demo import demo_checkpoint

    target = folder / f"demo-{scheme}.gguf"
    job = convert.prepare("gguf", demo_checkpoint(), target, quant=scheme, name="demo", force=force)
    say(job.plan.summary())
    with progress_bar(f"writing {job.path.name}", job.plan.nbytes) as advance:
        return convert.write(job, force=force, threads=threads, progress=advance).path


def _lacking() -> list[str]:
    from smolexport import plugins

    return [line for line in map(plugins.missing, ("torch", "llamacpp")) if line]


def _compare(files: list[Path], threads: int | None, *, quiet: bool) -> Comparison:
    from smolexport.cli.compare import run
    from smolexport.demo import demo_checkpoint, demo_text
    from smolexport.parity.candidates import exported, reference
    from smolexport.parity.results import Settings, Thresholds

    base, candidates = reference(demo_checkpoint()), [exported(path) for path in files]
    settings = Settings(threads=threads)
    return run(base, candidates, demo_text(), settings=settings, thresholds=Thresholds(), quiet=quiet)


def _verdicts(result: Comparison) -> list[str]:
    """One line per file that is further from bf16 than its scheme should be."""
    lines = []
    for candidate in result.candidates:
        kld, top1 = LIMITS[candidate.model.scheme]
        found = candidate.accuracy
        if found.kld.mean.value > kld or found.top1.value < top1:
            lines.append(
                f"{candidate.model.scheme}: KLD {found.kld.mean.value:.5f} (at most {kld}), "
                f"top-1 {found.top1.value:.3f} (at least {top1})"
            )
    return lines


def _show(result: Comparison, files: list[Path], threads: int | None) -> None:
    from smolexport.cli.compare import show
    from smolexport.generation import Sampling, generate
    from smolexport.plugins import runtime_for

    # So small a model repeats itself when it is greedy; the same seed shows both files making the same draws.
    sampling = Sampling(temperature=0.7, min_p=0.05, repetition_penalty=1.1, seed=1)
    show(result, json=False)
    for path in files:
        with runtime_for(path).open(path, threads=threads) as session:
            story = generate(session, PROMPT, sampling=sampling, max_tokens=60).text.strip()
        typer.echo(f"\n{path.name} continues {PROMPT!r}:\n{story}")

"""`smolexport demo`: export, run and compare the embedded model, offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from smolexport.cli import options
from smolexport.cli.streams import print_json, say
from smolexport.errors import MissingDependencyError
from smolexport.text import prose

if TYPE_CHECKING:
    from smolexport.parity.results import Comparison

# One pass each: the portable schemes in every format, and llama.cpp's usual choice.
PORTABLE = ("int8", "int4")
NATIVE = ("gguf", "q4_k_m")
PROMPT = "The old man opened the door and"
LIMITS = {"int8": (0.001, 0.98), "int4": (0.03, 0.88), "q4_k_m": (0.01, 0.92)}


@click.command("demo", short_help="Export, run and compare the embedded model, offline.")
@click.option("--path", is_flag=True, help="Only print the folder of the embedded checkpoint.")
@click.option("--out", "-o", metavar="FOLDER", type=options.given_path, help="Keep the exported files in this folder.")
@click.option("--force", "-f", is_flag=True, help="Replace existing files there.")
@options.threads
@options.json
def command(path: bool, out: Path | None, force: bool, threads: int | None, json: bool) -> None:
    """Export the embedded demo model to every format, run the files on their runtimes, compare them with bf16.

    Needs no network. Without torch or a runtime it exports, and prints how to install what is missing for the rest.
    """
    from smolexport.demo import demo_checkpoint
    from smolexport.files import scratch_folder

    if path:
        click.echo(str(demo_checkpoint()))
        return
    with scratch_folder("smolexport-demo-") as scratch:
        folder = out or scratch
        folder.mkdir(parents=True, exist_ok=True)
        files = _export(folder, threads, force=out is None or force)
        marks = _fingerprints(files)
        playable, lacking = _playable(files)
        if lacking:
            kept = f"in {out}" if out else "into a temporary folder (keep them with -o FOLDER)"
            say(f"exported {kept}; to run and compare all files install the runtimes:\n  " + "\n  ".join(lacking))
        verdicts = _unequal(marks)
        if playable:
            verdicts = _play(playable, marks, lacking, threads, json) + verdicts
        elif json:
            passed = False if verdicts else None  # without a runtime the main thing was not tested
            print_json({"candidates": [], "fingerprints": marks, "missing": lacking, "passed": passed})
        else:
            _show_fingerprints(marks)
        for line in verdicts:
            say(line)
    if verdicts:
        raise click.exceptions.Exit(1)


def _export(folder: Path, threads: int | None, *, force: bool) -> list[Path]:
    from smolexport.cli.export import write_jobs
    from smolexport.conversion.prepare import prepare, prepare_all

    passes = [
        *(prepare_all("demo", folder, quant=scheme, force=force) for scheme in PORTABLE),
        [prepare(NATIVE[0], "demo", folder, quant=NATIVE[1], force=force)],
    ]
    return [done.path for jobs in passes for done in write_jobs(jobs, force=force, threads=threads)]


def _fingerprints(files: list[Path]) -> dict[str, str]:
    from smolexport import fingerprint

    return {path.name: fingerprint(path) for path in files}


def _playable(files: list[Path]) -> tuple[list[Path], list[str]]:
    """The files whose runtime is installed, none without the reference; and how to install the others."""
    from smolexport import plugins

    def lacking(find: Callable[..., object], *path: Path) -> str | None:
        try:
            find(*path)
        except MissingDependencyError as error:
            return str(error)
        return None

    reference, lines = lacking(plugins.checkpoint_runtime), [lacking(plugins.runtime_for, path) for path in files]
    found = [path for path, line in zip(files, lines, strict=True) if line is None and reference is None]
    return found, list(dict.fromkeys(line for line in (reference, *lines) if line))


def _play(files: list[Path], marks: dict[str, str], lacking: list[str], threads: int | None, json: bool) -> list[str]:
    """Compare and show; returns a line for each file that is further from bf16 than its scheme should be."""
    from smolexport.cli.compare import print_comparison, run
    from smolexport.demo import demo_checkpoint, demo_text
    from smolexport.parity.candidates import exported, reference
    from smolexport.parity.inputs import Settings
    from smolexport.parity.report import to_json

    base, candidates = reference(demo_checkpoint()), exported(files)
    result = run(base, candidates, demo_text(), settings=Settings(threads=threads), cache=False, quiet=json)
    verdicts = _too_far(result)
    if json:
        passed = not verdicts and not _unequal(marks)
        print_json({**to_json(result), "fingerprints": marks, "missing": lacking, "passed": passed})
    else:
        print_comparison(result, json=False)
        _show_fingerprints(marks)
        for path in files:
            _show_story(path, threads)
    return verdicts


def _too_far(result: Comparison) -> list[str]:
    lines = []
    for candidate in result.candidates:
        kld, top1 = LIMITS[candidate.model.scheme]
        found = candidate.accuracy
        if found.kld.mean.value > kld or found.top1_agreement.value < top1:
            lines.append(
                f"{candidate.model.path.name}: KLD {found.kld.mean.value:.5f} (at most {kld}), "
                f"top-1 {found.top1_agreement.value:.3f} (at least {top1})"
            )
    return lines


def _unequal(marks: dict[str, str]) -> list[str]:
    """One line per portable scheme whose files hold different weights."""
    return [
        f"{scheme}: the formats hold different weights"
        for scheme in PORTABLE
        if len({mark for name, mark in marks.items() if scheme in name}) > 1
    ]


def _show_fingerprints(marks: dict[str, str]) -> None:
    click.echo("weights fingerprints (equal where the weights are):")
    for name, mark in marks.items():
        click.echo(f"  {mark}  {name}")


def _show_story(path: Path, threads: int | None) -> None:
    from smolexport import Sampling, generate

    # So small a model repeats itself when it is greedy; the same seed shows that all files make the same draws.
    sampling = Sampling(temperature=0.7, min_p=0.05, repetition_penalty=1.1, seed=1)
    story = generate(path, PROMPT, sampling=sampling, max_tokens=60, threads=threads).text.strip()
    click.echo(f"\n{path.name} continues {PROMPT!r}:\n{prose(story)}")

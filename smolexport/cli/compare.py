"""`smolexport compare`: compare exported files with their checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolexport.cli.options import (
    Integer,
    Number,
    checkpoint_argument,
    given_path,
    given_word,
    json_option,
    parse_settings,
    print_json,
    read_words,
    runtime_options,
    say,
    source_options,
    threads_option,
)
from smolexport.cli.streams import console

if TYPE_CHECKING:
    from smolexport.calibration.calibrator import Calibration
    from smolexport.calibration.statistics import Statistics
    from smolexport.parity.inputs import Candidate, Progress, Settings
    from smolexport.parity.results import Comparison
    from smolexport.parity.thresholds import Thresholds

PARITY_MISSED = 1
LIMITS = ("max_kld", "min_top1", "max_ppl_ratio")
SOURCE = ("ignore_config", "revision", "token")


@click.command("compare", short_help="Compare exported files with their checkpoint.")
@checkpoint_argument
@click.argument(
    "files", nargs=-1, type=given_path,
    help="Exported files or folders of that checkpoint; without any, temporary files are made in all formats.",
)  # fmt: skip
@click.option(
    "--quant", "-q", metavar="A,B", type=given_word,
    help="Schemes of the temporary files, each in all formats that have it, e.g. int8,int4,best4; "
    "best4 is each format's best 4-bit scheme; default: int4.",
)  # fmt: skip
@click.option(
    "--method", "methods", metavar="A,B", type=given_word,
    help="Calibration methods of the temporary files, all for each scheme, e.g. rtn,gptq,distil; default: rtn.",
)  # fmt: skip
@click.option(
    "--stats", metavar="FOLDER", type=given_path,
    help="Output of `smolexport calibrate`: required by all methods except rtn; also used to detect scored text in it.",
)  # fmt: skip
@click.option("--text", metavar="PATH", type=given_path, help="UTF-8 text to score; default: the demo's held-out text.")
@click.option("--max-kld", type=Number(min=0), help="Fail above this mean KLD.")
@click.option("--min-top1", type=Number(min=0, max=1), help="Fail below this top-1 agreement (0 to 1).")
@click.option("--max-ppl-ratio", type=Number(min=0), help="Fail above this perplexity ratio.")
@click.option(
    "--gate",
    metavar="FILE",
    type=given_path,
    help="TOML file with thresholds per format and scheme; options override it.",
)
@click.option("--junit", metavar="FILE", type=given_path, help="Write the verdicts as JUnit XML, for CI.")
@click.option("--dtype", default="bf16", help="Arithmetic of the reference: bf16 or f32.")
@click.option("--window", default=512, help="Tokens per window; the second half is scored.")
@click.option("--max-windows", type=Integer(min=1), help="Score at most this many windows.")
@click.option("--greedy-tokens", default=64, help="Greedy tokens per prompt; 0: skip.")
@click.option("--repetitions", default=3, help="Speed measurements per file; 0: skip.")
@click.option(
    "--attribution/--no-attribution", default=True,
    help="Split each deviation into quantization error and runtime error; also runs the decoded weights.",
)  # fmt: skip
@click.option("--cache/--no-cache", default=True, help="Keep the reference's logits for the next comparison.")
@click.option("--chat/--no-chat", default=True, help="Compare tokenizers on difficult texts, and chat templates.")
@threads_option
@click.option(
    "--runtime", "runtimes", metavar="NAME", multiple=True,
    help="Run files on this runtime; repeatable: each file on each runtime that can run it.",
)  # fmt: skip
@click.option(
    "--report", "reports", metavar="FILE", multiple=True, type=given_path,
    help="Also write a report: a page (.html), tables for a model card (.md) or JSON (.json); repeatable.",
)  # fmt: skip
@click.option("--force", "-f", is_flag=True, help="Replace existing reports.")
@runtime_options
@source_options
@json_option
def command(
    checkpoint: str,
    files: tuple[Path, ...],
    quant: str | None,
    methods: str | None,
    stats: Path | None,
    text: Path | None,
    gate: Path | None,
    junit: Path | None,
    dtype: str,
    cache: bool,
    runtimes: tuple[str, ...],
    reports: tuple[Path, ...],
    force: bool,
    settings: tuple[str, ...],
    json: bool,
    **amounts: Any,
) -> None:
    """Compare exported files with the checkpoint: accuracy, greedy agreement, speed, memory.

    KLD is the divergence of the file's predictions from the reference's, in nats per token (0 = equal); top-1 is the
    share of positions with the same most likely token. Exits with 1 if a threshold is missed.
    """
    from smolexport.parity.candidates import exported, reference
    from smolexport.parity.contamination import check_texts
    from smolexport.parity.inputs import Settings
    from smolexport.parity.report import check_reports, write_reports
    from smolexport.parity.thresholds import Thresholds, gate_from

    ways = _calibrations(files, quant, methods, stats)
    check_reports(reports, junit, force=force)
    limits = gate_from(gate, Thresholds(**{name: amounts.pop(name) for name in LIMITS}))
    (words, texts), options = _texts(text), parse_settings(settings)
    source = {"source": checkpoint, **{name: amounts.pop(name) for name in SOURCE}}
    amount = Settings(**amounts)
    base = reference(_folder(source), dtype, ignore_config=source["ignore_config"])
    statistics = _statistics(stats, base.path, source["ignore_config"], () if files else texts)
    made = nullcontext((files, runtimes)) if files else _made(source, quant or "int4", ways, runtimes, amount.threads)
    with made as (paths, players):
        candidates = exported(paths, options, players)
        check_texts(candidates, *texts)
        how: Any = {"settings": amount, "thresholds": limits, "statistics": statistics}
        result = run(base, candidates, words, cache=cache, quiet=json, **how)
        write_reports(reports, result, junit, force=force)
        print_comparison(result, json=json)  # last: the reader of stdout may close it (`| head`)
    if not result.passed:
        raise click.exceptions.Exit(PARITY_MISSED)


@contextmanager
def _made(
    source: Mapping[str, Any],
    quant: str,
    ways: Sequence[Calibration],
    runtimes: tuple[str, ...],
    threads: int | None,
) -> Iterator[tuple[Sequence[Path], tuple[str, ...]]]:
    """Temporary files of `source` in every format that an installed runtime reads, and all these runtimes.

    Each scheme is made with all methods of `ways` that affect it.
    """
    from smolexport import plugins
    from smolexport.cli.export import write_jobs
    from smolexport.conversion.prepare import prepare_all
    from smolexport.errors import MissingDependencyError
    from smolexport.files import scratch_folder

    players = [name for name in plugins.runtimes() if plugins.missing(name) is None]
    reads = {plugins.adapter(name).READS: name for name in players}
    formats = [name for name in plugins.converters() if plugins.converter(name).FORMAT in reads]
    if not formats:
        raise MissingDependencyError(
            "no runtime for exported files is installed; `smolexport list` shows how to install one"
        )
    wanted = runtimes or tuple(name for name in players if plugins.adapter(name).READS in formats)
    with scratch_folder("smolexport-compare-") as scratch:
        passes = [
            prepare_all(out=scratch, targets=targets, quant=scheme, calibration=way, **source)
            for scheme, names in _passes(formats, quant)
            for way, targets in _each_way(source, scheme, names, ways)
        ]
        yield [done.path for jobs in passes for done in write_jobs(jobs, force=False, threads=threads)], wanted


def _passes(formats: list[str], quant: str) -> list[tuple[str, list[str]]]:
    """Each scheme of the list `quant` with the formats that have it, without formats listed under an alias of it.

    A scheme that no format has comes with all formats: exporting it is an error that lists the available schemes.
    """
    from smolexport import plugins
    from smolexport.errors import UsageError

    seen: set[tuple[str, str]] = set()
    found = []
    for scheme in map(str.strip, quant.split(",")):
        if not scheme:
            raise UsageError(f"--quant {quant}: a scheme is missing next to a comma")
        known = {}
        for name in formats:
            with suppress(UsageError):
                known[name] = plugins.converter(name).find_scheme(scheme).name
        fresh = [name for name, own in known.items() if (name, own) not in seen]
        seen.update(known.items())
        if fresh or not known:
            found.append((scheme, fresh or formats))
    return found


def _texts(path: Path | None) -> tuple[str, list[bytes]]:
    """The text to score, and its bytes as they are and with normalized line ends."""
    from smolexport.demo import demo_text

    words = demo_text() if path is None else read_words(path)
    return words, [words.encode()] if path is None else [words.encode(), path.read_bytes()]


def _calibrations(
    files: Sequence[Path], quant: str | None, methods: str | None, stats: Path | None
) -> list[Calibration]:
    """Each method of the list with its statistics, once; none if files are given.

    Raises UsageError.
    """
    from smolexport.calibration.calibrator import Calibration
    from smolexport.errors import UsageError

    if files:
        for option, given, what in (("quant", quant, "schemes"), ("method", methods, "methods")):
            if given is not None:
                raise UsageError(f"--{option} {given}: applies only without files; the given files have their {what}")
        return []
    methods = methods or "rtn"
    names = list(dict.fromkeys(map(str.strip, methods.split(","))))
    if not all(names):
        raise UsageError(f"--method {methods}: a method is missing next to a comma")
    if names == ["rtn"]:
        return [Calibration("rtn", stats)]  # which rejects statistics
    return [Calibration(name, None if name == "rtn" else stats) for name in names]


def _each_way(
    source: Mapping[str, Any], scheme: str, formats: list[str], ways: Sequence[Calibration]
) -> Iterator[tuple[Calibration, list[str]]]:
    """Each method with the formats in which it affects `scheme`; plain rounding for formats in which none does."""
    from smolexport.calibration.calibrator import Calibration, reaches
    from smolexport.conversion.prepare import prepare_all

    calibrated = [way for way in ways if way.method != "rtn"]
    plain = len(calibrated) < len(ways)
    unreached = []
    if calibrated:
        jobs = prepare_all(targets=formats, quant=scheme, **source)
        unreached = [name for name, job in zip(formats, jobs, strict=True) if not reaches(job.plan)]
    if unreached:
        names = ", ".join(way.method for way in calibrated)
        say(f"note: {scheme} in {', '.join(unreached)}: {names} cannot affect it; using rtn")
    if first := formats if plain else unreached:
        yield Calibration(), first
    if rest := [name for name in formats if name not in unreached]:
        yield from ((way, rest) for way in calibrated)


def _statistics(
    stats: Path | None, folder: Path, ignore_config: tuple[str, ...], texts: Sequence[bytes]
) -> Statistics | None:
    """The statistics in `stats`; raises if they belong to another checkpoint or were collected on one of `texts`."""
    if stats is None:
        return None
    from smolexport.calibration.statistics import open_statistics
    from smolexport.model.checkpoint import open_checkpoint
    from smolexport.parity.contamination import check_sources

    found = open_statistics(stats, open_checkpoint(folder, ignore_config=ignore_config))
    check_sources(found.manifest.sources, str(stats), *texts)
    return found


def _folder(source: Mapping[str, Any]) -> Path:
    from smolexport.model.checkpoint import find_checkpoint

    return find_checkpoint(source["source"], revision=source["revision"], token=source["token"])


def run(
    base: Candidate,
    candidates: list[Candidate],
    text: str,
    *,
    settings: Settings,
    thresholds: Thresholds,
    cache: bool = True,
    statistics: Statistics | None = None,
    quiet: bool = False,
) -> Comparison:
    """Compare with a progress bar on stderr; `cache`: keep the reference's logits.  Raises SmolexportError."""
    from smolexport.parity.compare import compare

    folder = _cache_folder() if cache else None
    with stages(quiet) as progress:
        return compare(
            base, candidates, text=text, settings=settings, thresholds=thresholds, cache=folder,
            statistics=statistics, progress=progress,
        )  # fmt: skip


def _cache_folder() -> Path | None:
    """The folder for the reference's logits; None, and a note, if it cannot be written."""
    from smolexport.errors import OutputError
    from smolexport.parity.logit_cache import usual_folder

    try:
        return usual_folder()
    except OutputError as error:
        say(f"note: the reference's logits are not kept for the next comparison: {error}")
        return None


@contextmanager
def stages(quiet: bool) -> Iterator[Progress | None]:
    """A progress bar per stage on stderr, if that is a terminal."""
    import sys

    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def print_comparison(result: Comparison, *, json: bool) -> None:
    """Print tables, or JSON, on stdout."""
    from smolexport.parity.report import render, to_json

    if json:
        print_json(to_json(result))
        return
    render(result, console())

"""`smolexport compare`: compare exported files with their checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolexport.cli import options
from smolexport.cli.streams import console, print_json, say, stages
from smolexport.errors import MissingDependencyError, OutputError, UsageError

if TYPE_CHECKING:
    from smolexport.calibration.calibrator import Calibration
    from smolexport.calibration.statistics import Statistics
    from smolexport.parity.inputs import Candidate
    from smolexport.parity.results import Comparison

PARITY_MISSED = 1
LIMITS = ("max_kld", "min_top1", "max_ppl_ratio")


@click.command("compare", short_help="Compare exported files with their checkpoint.")
@options.checkpoint
@click.argument(
    "files", nargs=-1, type=options.given_path,
    help="Exported files or folders of that checkpoint; without any, temporary files are made in all formats.",
)  # fmt: skip
@click.option(
    "--quant", "-q", "schemes", metavar="A,B", type=options.words,
    help="Schemes of the temporary files, each in all formats that have it, e.g. int8,int4,best4; "
    "best4 is each format's best 4-bit scheme; default: int4.",
)  # fmt: skip
@click.option(
    "--method", "methods", metavar="A,B", type=options.words,
    help="Calibration methods of the temporary files, all for each scheme, e.g. rtn,gptq,distil; default: rtn.",
)  # fmt: skip
@click.option(
    "--stats", metavar="FOLDER", type=options.given_path,
    help="Output of `smolexport calibrate`: required by all methods except rtn; also used to detect scored text in it.",
)  # fmt: skip
@options.text
@click.option("--max-kld", type=options.Number(min=0), help="Fail above this mean KLD.")
@click.option("--min-top1", type=options.Number(min=0, max=1), help="Fail below this top-1 agreement (0 to 1).")
@click.option("--max-ppl-ratio", type=options.Number(min=0), help="Fail above this perplexity ratio.")
@click.option(
    "--gate", metavar="FILE", type=options.given_path,
    help="TOML file with thresholds per format and scheme; options override it.",
)  # fmt: skip
@click.option("--junit", metavar="FILE", type=options.given_path, help="Write the verdicts as JUnit XML, for CI.")
@click.option("--dtype", default="bf16", help="Arithmetic of the reference: bf16 or f32.")
@click.option("--window", default=512, help="Tokens per window; the second half is scored.")
@click.option("--max-windows", type=options.Integer(min=1), help="Score at most this many windows.")
@click.option("--greedy-tokens", default=64, help="Greedy tokens per prompt; 0: skip.")
@click.option("--repetitions", default=3, help="Speed measurements per file; 0: skip.")
@click.option(
    "--attribution/--no-attribution", default=True,
    help="Split each deviation into quantization error and runtime error; also runs the decoded weights.",
)  # fmt: skip
@click.option("--cache/--no-cache", default=True, help="Keep the reference's logits for the next comparison.")
@click.option("--chat/--no-chat", default=True, help="Compare tokenizers on difficult texts, and chat templates.")
@options.threads
@options.runtimes
@click.option(
    "--report", "reports", metavar="FILE", multiple=True, type=options.given_path,
    help="Also write a report: a page (.html), tables for a model card (.md) or JSON (.json); repeatable.",
)  # fmt: skip
@click.option("--force", "-f", is_flag=True, help="Replace existing reports.")
@options.runtime_settings
@options.source
@options.json
def command(
    checkpoint: str,
    files: tuple[Path, ...],
    schemes: list[str] | None,
    methods: list[str] | None,
    stats: Path | None,
    text: Path | None,
    gate: Path | None,
    junit: Path | None,
    dtype: str,
    cache: bool,
    runtimes: tuple[str, ...],
    reports: tuple[Path, ...],
    force: bool,
    settings: dict[str, Any],
    json: bool,
    **amounts: Any,
) -> None:
    """Compare exported files with the checkpoint: accuracy, greedy agreement, speed, memory.

    KLD is the divergence of the file's predictions from the reference's, in nats per token (0 = equal); top-1 is the
    share of positions with the same most likely token. Exits with 1 if a threshold is missed.
    """
    from smolexport.model.checkpoint import find_checkpoint
    from smolexport.parity import candidates, contamination, report, thresholds
    from smolexport.parity.inputs import Settings

    ways = _calibrations(files, schemes, methods, stats)
    report.check_reports(reports, junit, force=force)
    limits = thresholds.gate_from(gate, thresholds.Thresholds(**{name: amounts.pop(name) for name in LIMITS}))
    words, texts = _texts(text)
    ignored = {"ignore_config": amounts.pop("ignore_config")}
    place = {name: amounts.pop(name) for name in ("revision", "token")}
    amount = Settings(**amounts)
    base = candidates.reference(find_checkpoint(checkpoint, **place), dtype, **ignored)
    statistics = _statistics(stats, base.path, () if files else texts, **ignored)
    request = {"source": checkpoint, **ignored, **place}
    made = nullcontext((files, runtimes)) if files else _made(request, schemes, ways, runtimes, amount.threads)
    with made as (paths, used):
        exported = candidates.exported(paths, settings, used)
        contamination.check_texts(exported, *texts)
        how: Any = {"settings": amount, "thresholds": limits, "statistics": statistics}
        result = run(base, exported, words, cache=cache, quiet=json, **how)
        report.write_reports(reports, result, junit, force=force)
        print_comparison(result, json=json)  # last: the reader of stdout may close it (`| head`)
    if not result.passed:
        raise click.exceptions.Exit(PARITY_MISSED)


@contextmanager
def _made(
    request: Mapping[str, Any],
    schemes: list[str] | None,
    ways: Sequence[Calibration],
    runtimes: tuple[str, ...],
    threads: int | None,
) -> Iterator[tuple[Sequence[Path], tuple[str, ...]]]:
    """Temporary files in every format that an installed runtime reads, and the runtimes for them.

    Each scheme is made with all methods of `ways` that affect it.
    """
    from smolexport import plugins
    from smolexport.cli.export import write_jobs
    from smolexport.conversion.prepare import prepare_all
    from smolexport.files import scratch_folder

    reads = {name: plugins.adapter(name).READS for name in plugins.runtimes() if plugins.missing(name) is None}
    formats = [name for name in plugins.converters() if plugins.converter(name).FORMAT in reads.values()]
    if not formats:
        raise MissingDependencyError(
            "no runtime for exported files is installed; `smolexport list` shows how to install one"
        )
    with scratch_folder("smolexport-compare-") as scratch:
        passes = [
            prepare_all(out=scratch, targets=targets, quant=scheme, calibration=way, **request)
            for scheme, names in _passes(formats, schemes or ["int4"])
            for way, targets in _each_way(request, scheme, names, ways)
        ]
        paths = [done.path for jobs in passes for done in write_jobs(jobs, force=False, threads=threads)]
        yield paths, runtimes or tuple(name for name, kind in reads.items() if kind in formats)


def _passes(formats: list[str], schemes: list[str]) -> list[tuple[str, list[str]]]:
    """Each scheme with the formats that have it, without formats that already have it under an alias.

    A scheme that no format has comes with all formats: exporting it is an error that lists the available schemes.
    """
    from smolexport import plugins

    seen: set[tuple[str, str]] = set()
    found = []
    for scheme in schemes:
        if not scheme:
            raise UsageError(f"--quant {','.join(schemes)}: a scheme is missing next to a comma")
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

    words = demo_text() if path is None else options.read_words(path)
    return words, [words.encode()] if path is None else [words.encode(), path.read_bytes()]


def _calibrations(
    files: Sequence[Path], schemes: list[str] | None, methods: list[str] | None, stats: Path | None
) -> list[Calibration]:
    """Each method with its statistics, once; none if files are given.  Raises UsageError."""
    from smolexport.calibration.calibrator import Calibration

    if files:
        for option, given, what in (("quant", schemes, "schemes"), ("method", methods, "methods")):
            if given is not None:
                words = ",".join(given)
                raise UsageError(f"--{option} {words}: applies only without files; the given files have their {what}")
        return []
    names = list(dict.fromkeys(methods or ["rtn"]))
    if not all(names):
        raise UsageError(f"--method {','.join(methods or ())}: a method is missing next to a comma")
    if names == ["rtn"]:
        return [Calibration("rtn", stats)]  # which rejects statistics
    return [Calibration(name, None if name == "rtn" else stats) for name in names]


def _each_way(
    request: Mapping[str, Any], scheme: str, formats: list[str], ways: Sequence[Calibration]
) -> Iterator[tuple[Calibration, list[str]]]:
    """Each method with the formats in which it affects `scheme`; plain rounding for formats in which none does."""
    from smolexport.calibration.calibrator import Calibration, reaches
    from smolexport.conversion.prepare import prepare_all

    calibrated = [way for way in ways if way.method != "rtn"]
    unreached = []
    if calibrated:
        jobs = prepare_all(targets=formats, quant=scheme, **request)
        unreached = [name for name, job in zip(formats, jobs, strict=True) if not reaches(job.plan)]
    if unreached:
        names = ", ".join(way.method for way in calibrated)
        say(f"note: {scheme} in {', '.join(unreached)}: {names} cannot affect it; using rtn")
    if plain := formats if len(calibrated) < len(ways) else unreached:
        yield Calibration(), plain
    if rest := [name for name in formats if name not in unreached]:
        yield from ((way, rest) for way in calibrated)


def _statistics(
    stats: Path | None, folder: Path, texts: Sequence[bytes], ignore_config: tuple[str, ...]
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


def run(base: Candidate, candidates: list[Candidate], text: str, *, cache: bool, quiet: bool, **how: Any) -> Comparison:
    """Compare with a progress bar on stderr; `cache`: keep the reference's logits.  Raises SmolexportError."""
    from smolexport.parity.compare import compare
    from smolexport.parity.logit_cache import usual_folder

    folder = None
    if cache:
        try:
            folder = usual_folder()
        except OutputError as error:
            say(f"note: the reference's logits are not kept for the next comparison: {error}")
    with stages(quiet) as progress:
        return compare(base, candidates, text=text, cache=folder, progress=progress, **how)


def print_comparison(result: Comparison, *, json: bool) -> None:
    """Print tables, or JSON, on stdout."""
    from smolexport.parity.report import render, to_json

    if json:
        print_json(to_json(result))
    else:
        render(result, console())

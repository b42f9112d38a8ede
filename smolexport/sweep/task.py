"""One task: export, compare, and write the record after each.

What a killed attempt had finished is kept: the next one starts with what its record lacks.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolexport.cleanup import Provisional
from smolexport.conversion import pipeline
from smolexport.conversion.model_card import installed_version
from smolexport.conversion.prepare import prepare
from smolexport.errors import CheckpointError, OutputError, SmolexportError, UsageError
from smolexport.files import locked
from smolexport.model.identity import file_hash
from smolexport.sweep import record as records
from smolexport.sweep.plan import STATE, Task
from smolexport.sweep.record import TaskRecord, signature
from smolexport.text import one_line

if TYPE_CHECKING:
    from smolexport.parity.inputs import Candidate, Settings


MARK, WORK = "mark-", "work"
FIGURES = (
    "runtime", "fingerprint", "kld", "top1_agreement", "top1_agreement_error", "top5_overlap", "perplexity",
    "perplexity_error", "perplexity_ratio", "perplexity_ratio_error", "tokenizer_equal",
)  # fmt: skip


def attempt(task: Task) -> TaskRecord:
    """Do what the record lacks; returns the record, whose `error` says in one line what went wrong."""
    try:
        _check_place(task)
        return _run(task)
    except SmolexportError as error:
        line = str(error)
    except MemoryError:
        line = f"{task.folder}: out of memory; use fewer --jobs"
    except OSError as error:
        line = f"{error.filename or task.folder}: {error.strerror or error}"
    except Exception as error:  # of a library, unforeseen: it ends this task, not the sweep
        line = f"{task.folder}: {type(error).__name__}: {error}"
    failed = replace(records.read_record(task), error=one_line(line))
    if _mark(task).exists():  # else this is another machine's folder, or another sweep has taken over
        with suppress(SmolexportError, OSError):
            records.write_record(task, failed)
    return failed


def _mark(task: Task) -> Path:
    """A file that shows a machine that it sees what the driver sees; its name is unique to the sweep."""
    return Path(task.config.out) / STATE / f"{MARK}{task.config.mark}"


def _check_place(task: Task) -> None:
    """Refuse a machine that does not see what the driver sees, or has another version of smolexport."""
    host, here = socket.gethostname(), installed_version()
    shared = "it must be on storage that all machines share"
    if not _mark(task).exists():
        raise OutputError(f"{task.config.out}: is not the same folder on {host}; {shared}")
    if not Path(task.folder).is_dir():
        raise CheckpointError(f"{task.folder}: does not exist on {host}; {shared}")
    if task.config.version != here:
        raise UsageError(f"smolexport is {here} on {host} and {task.config.version} where the sweep was started")


def _run(task: Task) -> TaskRecord:
    found = records.read_record(task)
    made, compared = records.done(task, found)
    if not made or task.config.force:
        found = _export(task, found)
        records.write_record(task, found)
    if task.config.text is not None and (found.compared is None or not compared):
        found = replace(found, compared=_compare(task, Path(task.config.out) / found.target))
        _check_place(task)
        _check_unchanged(task)
    found = replace(found, error="")
    records.write_record(task, found)
    return found


def _export(task: Task, found: TaskRecord) -> TaskRecord:
    """Write the output in a folder of its own and move it to its place, if the earlier record `found` allows that."""
    # no other sweep has this mark: processes of a lost one, on other machines, do not write here
    work = Path(task.config.out) / STATE / WORK / task.config.mark / task.key
    shutil.rmtree(work, ignore_errors=True)  # of an attempt that was killed
    with Provisional(lambda: shutil.rmtree(work, ignore_errors=True), work):
        work.mkdir(parents=True, exist_ok=True)  # a network file system may keep what a process still holds
        job = prepare(
            task.format, Path(task.folder), work, quant=task.scheme, name=task.name,
            ignore_config=task.config.ignore_config,
        )  # fmt: skip
        target = Path(task.name) / job.path.name
        place = Path(task.config.out) / target
        if os.path.lexists(place) and not task.config.force:
            _check_ours(task, found, target)
        started = replace(records.empty(task), target=str(target))
        records.write_record(task, started)  # from now on the target may be replaced
        _check_unchanged(task)
        done = pipeline.write(job, threads=task.threads)
        _check_unchanged(task)
        files = _facts(job.path)
        _check_place(task)  # as late as possible: after this, another sweep may have taken over
        _move(job.path, place, work)
    exported = {
        "inputs": records.export_inputs(task),
        "files": files,
        "bytes": done.bytes,
        "weights": done.plan.weights,
        "bits_per_weight": round(done.plan.bits_per_weight, 4),
        "notes": [*done.plan.fallback_lines(), *done.plan.notes],
        "seconds": round(done.seconds, 3),
    }
    return replace(started, exported=exported)


def _check_ours(task: Task, found: TaskRecord, target: Path) -> None:
    """Refuse to replace what no sweep made, or what one made of another checkpoint of the same name."""
    place = Path(task.config.out) / target
    if found.target != str(target):
        raise OutputError(f"{place}: exists already, not made by a sweep; remove it or pass --force")
    if found.source != task.origin:
        way = "name both in one sweep, give another folder with -o, or pass --force"
        raise OutputError(f"{place}: was made from {found.source}; {way}")


def _check_unchanged(task: Task) -> None:
    """Refuse to record a fingerprint that was not taken of these weights."""
    if signature(Path(task.folder)) != task.seen:
        raise CheckpointError(f"{task.folder}: changed during the sweep; start it again")


def _facts(path: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file of the output `path`, by name relative to the folder that holds it."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {
        file.relative_to(path.parent).as_posix(): {"bytes": file.stat().st_size, "sha256": file_hash(file)}
        for file in files
    }


def _move(made: Path, place: Path, work: Path) -> None:
    """Give a finished output its name; an earlier output is removed with `work`."""
    place.parent.mkdir(exist_ok=True)
    aside = work / "replaced"
    with Provisional(lambda: os.path.lexists(aside) and not os.path.lexists(place) and aside.rename(place)):
        if made.is_dir() and os.path.lexists(place):
            place.rename(aside)
        made.replace(place)


def _compare(task: Task, path: Path) -> dict[str, Any]:
    """Compare the output at `path` with its checkpoint."""
    from smolexport.parity.candidates import exported, reference
    from smolexport.parity.compare import compare
    from smolexport.parity.inputs import Settings
    from smolexport.parity.logit_cache import usual_folder
    from smolexport.parity.report import to_json

    start, text = time.perf_counter(), task.config.text or ""
    # Rates and memory mean nothing beside other tasks, and the table has no column for the rest.
    settings = Settings(
        window=task.config.window, max_windows=task.config.max_windows, greedy_tokens=0, repetitions=0,
        threads=task.threads, memory=False, attribution=False,
    )  # fmt: skip
    base = reference(Path(task.folder), ignore_config=task.config.ignore_config)
    cache = None
    with suppress(OutputError):  # no folder can be written: the reference runs for this task alone
        cache = usual_folder()
    notes = _run_once(base, text, settings, cache, task) if cache else []
    sheet = to_json(compare(base, exported([path]), text=text, settings=settings, cache=cache))
    [candidate] = sheet["candidates"]
    return {
        "inputs": records.compare_inputs(task),
        **{name: candidate[name] for name in FIGURES},
        "notes": [*notes, *candidate["notes"]],
        "reference_perplexity": sheet["reference"]["perplexity"],
        "scored_positions": sheet["text"]["scored_positions"],
        "seconds": round(time.perf_counter() - start, 3),
    }


def _run_once(base: Candidate, text: str, settings: Settings, folder: Path, task: Task) -> list[str]:
    """Run the reference and keep its logits in `folder`; other tasks of the same checkpoint wait.  Returns notes."""
    from smolexport.parity.logit_cache import LogitCache
    from smolexport.parity.reference import run_reference

    lock = locked(folder / f".running-{task.fingerprint[:2]}") if os.access(folder, os.W_OK) else nullcontext()
    with lock, LogitCache(folder) as cache:
        run_reference(base, text, settings, cache)
    return cache.notes

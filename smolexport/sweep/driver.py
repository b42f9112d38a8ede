"""All tasks of a sweep: finished ones are kept, the rest run, and a task whose process dies is started again."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Protocol

from smolexport.cleanup import Provisional
from smolexport.conversion.prepare import prepare
from smolexport.errors import CheckpointError, OutputError, SmolexportError
from smolexport.files import atomic_file, check_parent, check_space, locked
from smolexport.sweep import record as records
from smolexport.sweep.plan import STATE, TABLE, SweepSource, Task
from smolexport.sweep.record import Hashes, TaskRecord, signature
from smolexport.sweep.table import SweepProgress, TaskRow, table_json
from smolexport.sweep.task import MARK, WORK

ATTEMPTS = 3  # processes per task
GRACE = 10.0  # seconds for a stopped process to remove what it has half written
HASHES = "hashes.json"
USUAL_THREADS = 4  # per task, unless the number of jobs is given


class SweepEngine(Protocol):
    """Where tasks run, each in a fresh process: this machine or a Ray cluster.  Retries are the driver's."""

    jobs: int  # tasks at a time
    threads: int  # of each task

    def start(self, task: Task) -> None:
        """Start `task`; at most `jobs` are under way.  Raises SessionError."""
        ...

    def wait(self) -> tuple[Task, TaskRecord | str]:
        """Wait for a task to end; returns it with its record, or with the reason why its process left none.

        The record comes from the process, not from the disk: storage shared by machines may show an older one.
        """
        ...

    def close(self) -> None:
        """Stop what is under way without leaving half-written files, and release everything."""
        ...


def share(cores: Sequence[int], jobs: int | None) -> tuple[int, int]:
    """Tasks at a time, and threads of each, on machines with `cores` processors."""
    at_a_time = max(1, sum(cores) // USUAL_THREADS) if jobs is None else jobs
    return at_a_time, max(1, min(sum(cores) // at_a_time, max(cores, default=1)))


def preview(sources: Sequence[SweepSource], tasks: Sequence[Task], out: Path) -> list[TaskRow]:
    """What `sweep` would do, from headers alone: tasks kept, to do (with the output's size) or refused.

    The weights of hub ids may be missing, and so may `out`; raises OutputError if it cannot be made.
    """
    check_parent(out)
    known = {source.name for source in sources if (out / STATE / "records" / source.name).is_dir()}
    asked = [source for source in sources if source.name in known or source.folder is None]
    marks, errors = _fingerprints(asked, Hashes(out / STATE / HASHES), lambda _: None)
    given = (replace(task, fingerprint=marks.get(task.name, ("", ""))[0]) for task in tasks)
    return [_settled(task, errors.get(task.name)) or _planned(task) for task in given]


def sweep(
    sources: Sequence[SweepSource],
    tasks: Sequence[Task],
    out: Path,
    engine: Callable[[int | None], SweepEngine],
    progress: SweepProgress,
) -> list[TaskRow]:
    """Run all tasks that are not done, and write sweep.json in `out`; returns a row for each task, in their order.

    `engine` is opened only if a task has to run, with the descriptor of a lock for its processes to hold.

    Raises:
        OutputError: the folder cannot be written to, or another sweep runs in it.
        SmolexportError: the engine cannot be opened or does not answer; tasks that ended have their records.
    """
    with _opened(out) as (mark, lock):
        hashes = Hashes(out / STATE / HASHES)
        marks, errors = _fingerprints(sources, hashes, progress.reading)
        hashes.save()
        rows: dict[Path, TaskRow] = {}
        waiting = []
        for task in tasks:
            fingerprint, seen = marks.get(task.name, ("", ""))
            known = replace(task, config=replace(task.config, mark=mark), fingerprint=fingerprint, seen=seen)
            if row := _settled(known, errors.get(task.name)):
                rows[task.key] = row
                progress.ended(row)
            else:
                waiting.append(known)
        if waiting:
            place = engine(lock)
            try:
                for row in _ended(_interleaved(waiting), place, progress):
                    rows[row.task.key] = row
                    progress.ended(row)
            finally:
                place.close()
        ordered = [rows[task.key] for task in tasks]
        with atomic_file(out / TABLE, force=True) as file:
            file.write((json.dumps(table_json(ordered), indent=2, allow_nan=False) + "\n").encode())
    return ordered


@contextmanager
def _opened(out: Path) -> Iterator[tuple[str, int | None]]:
    """Work in the folder `out`, created if missing; yields its mark and the lock's descriptor.  Raises OutputError."""
    check_parent(out)
    state = out / STATE
    if os.path.lexists(out / TABLE) and not state.is_dir():
        raise OutputError(
            f"{out / TABLE}: exists already, not made by a sweep; remove it or give another folder with -o"
        )
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror or error}; give another folder with -o") from error
    check_space(state, 0)
    # the processes of a sweep that was killed hold the lock until they have ended
    with (
        locked(state / "lock", GRACE + 5, "is locked: another sweep runs in this folder; wait for it") as lock,
        Provisional(lambda: _tidy(state)),
    ):
        _tidy(state)
        mark = uuid.uuid4().hex
        with atomic_file(state / f"{MARK}{mark}"):
            pass
        yield mark, lock


def _tidy(state: Path) -> None:
    """Remove what killed processes had half written, and the marks of earlier sweeps."""
    shutil.rmtree(state / WORK, ignore_errors=True)
    for mark in state.glob(f"{MARK}*"):
        mark.unlink(missing_ok=True)


def _fingerprints(
    sources: Sequence[SweepSource], hashes: Hashes, on_reading: Callable[[str], None]
) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """By name: fingerprint and signature of each checkpoint that can be read, the error of each that cannot."""
    marks, errors = dict[str, tuple[str, str]](), dict[str, str]()
    for source in sources:
        if source.folder is None:
            errors[source.name] = source.error
            continue
        on_reading(source.name)
        try:
            seen = signature(source.folder)  # first: a change while the files are read shows later
            marks[source.name] = hashes.fingerprint(source.folder), seen
        except (CheckpointError, OSError) as error:
            errors[source.name] = str(error)
    return marks, errors


def _settled(task: Task, error: str | None) -> TaskRow | None:
    """The row of a task that need not run: its checkpoint has an `error`, or it is done."""
    if error is not None:
        return TaskRow(task, "failed", records.empty(task), error)
    found = records.read_record(task)
    kept = all(records.done(task, found)) and not found.error and not task.config.force
    return TaskRow(task, "kept", found) if kept else None


def _planned(task: Task) -> TaskRow:
    """The row of a task that would run."""
    found = records.read_record(task)
    if records.done(task, found)[0] and not task.config.force:
        return TaskRow(task, "to do", replace(found, compared=None))
    try:
        plan = prepare(
            task.format, Path(task.folder), task.config.out, quant=task.scheme, name=task.name,
            ignore_config=task.config.ignore_config, weights=False,
        ).plan  # fmt: skip
    except SmolexportError as refused:
        return _failed(task, found, str(refused))
    sizes = {
        "bytes": plan.size,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "notes": plan.fallback_lines(),
    }
    return TaskRow(task, "to do", replace(found, exported=sizes, compared=None, error=""))


def _interleaved(tasks: Sequence[Task]) -> list[Task]:
    """One task of each checkpoint, then another of each: tasks at work seldom wait for the same reference."""
    groups = [list(group) for _, group in groupby(tasks, key=lambda task: task.name)]
    return [task for turn in zip_longest(*groups) for task in turn if task]


def _ended(tasks: Sequence[Task], engine: SweepEngine, progress: SweepProgress) -> Iterator[TaskRow]:
    """Run all tasks, as many at a time as the engine takes; those whose process died run again."""
    waiting = [replace(task, threads=engine.threads) for task in reversed(tasks)]
    attempts = dict.fromkeys(waiting, 0)
    running = 0
    while waiting or running:
        while waiting and running < engine.jobs:
            task = waiting.pop()
            attempts[task] += 1
            running += 1
            progress.started(task)
            engine.start(task)
        task, found = engine.wait()
        running -= 1
        if isinstance(found, str) and (row := _settled(task, None)):  # it died after its work
            found = row.record
        if isinstance(found, TaskRecord):
            yield _failed(task, found, found.error) if found.error else TaskRow(task, "new", found)
        elif attempts[task] < ATTEMPTS:
            progress.again(task, found, attempts[task] + 1)
            waiting.append(task)
        else:
            reason = f"{task.title}: {found}, {ATTEMPTS} times; if memory is short, use fewer --jobs"
            yield _failed(task, records.read_record(task), reason)


def _failed(task: Task, found: TaskRecord, error: str) -> TaskRow:
    return TaskRow(task, "failed", records.holding(task, found), error)

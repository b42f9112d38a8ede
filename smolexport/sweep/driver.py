"""All tasks of a sweep: what is done already is kept, the rest runs, and a process that dies gets a successor."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from smolexport.cleanup import Provisional
from smolexport.errors import CheckpointError, OutputError
from smolexport.files import atomic_file, check_parent, check_space
from smolexport.sweep import record as records
from smolexport.sweep.engine import SweepEngine
from smolexport.sweep.lock import held
from smolexport.sweep.plan import STATE, TABLE, SweepSource, Task
from smolexport.sweep.record import TaskRecord
from smolexport.sweep.table import TaskRow, table_json
from smolexport.sweep.task import MARK, WORK
from smolexport.sweep.task_hash import Hashes, signature
from smolexport.sweep.worker import GRACE

ATTEMPTS = 3  # processes that a task may use up
HASHES = "hashes.json"


class Observer(Protocol):
    """Whoever follows a sweep."""

    def reading(self, name: str) -> None:
        """The checkpoint's fingerprint is being taken."""
        ...

    def started(self, task: Task) -> None:
        """A process has it."""
        ...

    def again(self, task: Task, reason: str, number: int) -> None:
        """Its process died; attempt `number` follows."""
        ...

    def ended(self, row: TaskRow) -> None:
        """It is done, or has failed for good."""
        ...


@contextmanager
def _opened(out: Path) -> Iterator[tuple[str, int | None]]:
    """Work in the folder `out`, which is made when it is missing; yields its mark and the lock's descriptor.

    Raises:
        OutputError: it cannot be made or written to, or another sweep works there.
    """
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
        held(state / "lock", GRACE + 5, "is held: another sweep works in this folder; wait for it") as lock,
        Provisional(lambda: _tidy(state)),
    ):
        _tidy(state)
        mark = uuid.uuid4().hex
        with atomic_file(state / f"{MARK}{mark}"):
            pass
        yield mark, lock


def _tidy(state: Path) -> None:
    """Remove what processes that were killed had half written, and the marks of sweeps that are over."""
    shutil.rmtree(state / WORK, ignore_errors=True)
    for mark in state.glob(f"{MARK}*"):
        mark.unlink(missing_ok=True)


def fingerprinted(
    sources: Sequence[SweepSource], hashes: Hashes, on_reading: Callable[[str], None]
) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Fingerprint and signature of every checkpoint, and what stands against those that have none, by name.

    Args:
        sources: the checkpoints.
        hashes: of files that are known from earlier.
        told: called with the name of each before it is read.
    """
    marks, errors = dict[str, tuple[str, str]](), dict[str, str]()
    for source in sources:
        if source.folder is None:
            errors[source.name] = source.error
            continue
        on_reading(source.name)
        try:
            seen = signature(source.folder)
            marks[source.name] = hashes.fingerprint(source.folder), seen
        except (CheckpointError, OSError) as error:
            errors[source.name] = str(error)
    return marks, errors


def state_of(task: Task) -> tuple[TaskRecord, bool]:
    """The task's record, and whether it tells of all that is asked for."""
    found = records.read_record(task)
    return found, all(records.done(task, found)) and not found.error


def sweep(
    sources: Sequence[SweepSource],
    tasks: Sequence[Task],
    out: Path,
    engine: Callable[[int | None], SweepEngine],
    observer: Observer,
) -> list[TaskRow]:
    """Do all tasks that are not done; leaves sweep.json in `out`.

    Args:
        sources: the checkpoints.
        tasks: what `tasks_of` made of them.
        out: the folder of the outputs.
        engine: opens the engine, which is needed only where something has to be done; given the descriptor of a lock
            that its processes should hold.
        observer: told about each step.

    Returns:
        A row for each task, in their order.

    Raises:
        OutputError: the folder cannot be written to, or another sweep works there.
        SmolexportError: the engine cannot be opened or does not answer; tasks that ended have their records.
    """
    with _opened(out) as (mark, lock):
        hashes = Hashes(out / STATE / HASHES)
        marks, errors = fingerprinted(sources, hashes, observer.reading)
        hashes.save()
        known = [_known(task, mark, *marks.get(task.name, ("", ""))) for task in tasks]
        rows = _run(known, errors, lambda: engine(lock), observer)
        with atomic_file(out / TABLE, force=True) as file:
            file.write((json.dumps(table_json(rows), indent=2, allow_nan=False) + "\n").encode())
    return rows


def _known(task: Task, mark: str, fingerprint: str, seen: str) -> Task:
    return replace(task, config=replace(task.config, mark=mark), fingerprint=fingerprint, seen=seen)


def _run(
    tasks: Sequence[Task], errors: Mapping[str, str], engine: Callable[[], SweepEngine], observer: Observer
) -> list[TaskRow]:
    """A row for each task; `errors` are those of checkpoints that cannot be read, by name."""
    rows: dict[Task, TaskRow] = {}
    for task in tasks:
        found, whole = state_of(task)
        if task.name in errors:
            rows[task] = TaskRow(task, "failed", records.empty(task), errors[task.name])
        elif whole and not task.config.force:
            rows[task] = TaskRow(task, "kept", found)
        else:
            continue
        observer.ended(rows[task])
    waiting = [task for task in tasks if task not in rows]
    if waiting:
        place = engine()
        try:
            for row in _ended(_interleaved(waiting), place, observer):
                rows[row.task] = row
                observer.ended(row)
        finally:
            place.close()
    return [rows[task] for task in tasks]


def _interleaved(tasks: Sequence[Task]) -> list[Task]:
    """One of each checkpoint, then another of each: those at work at a time seldom wait for the same reference."""
    seen: dict[str, int] = {}
    turns = []
    for task in tasks:
        seen[task.name] = turn = seen.get(task.name, 0) + 1
        turns.append(turn)
    order = sorted(range(len(tasks)), key=turns.__getitem__)
    return [tasks[place] for place in order]


def _ended(tasks: list[Task], engine: SweepEngine, observer: Observer) -> Iterator[TaskRow]:
    """Start all, as many at a time as the engine takes, and again those whose process died."""
    attempts = dict.fromkeys(tasks, 0)
    started: dict[Task, Task] = {}
    waiting = tasks[::-1]
    while waiting or started:
        while waiting and len(started) < engine.jobs:
            task = waiting.pop()
            attempts[task] += 1
            given = replace(task, threads=engine.threads)
            started[given] = task
            observer.started(task)
            engine.start(given)
        given, ending = engine.wait()
        task = started.pop(given)
        found = ending.record
        if found is None and state_of(task)[1] and not task.config.force:  # it died after its work
            found = records.read_record(task)
        if found is None and attempts[task] < ATTEMPTS:
            observer.again(task, ending.reason, attempts[task] + 1)
            waiting.append(task)
        elif found is None:
            reason = f"{task.title}: {ending.reason}, {ATTEMPTS} times; if memory is short, take fewer --jobs"
            yield TaskRow(task, "failed", records.holding(task, records.read_record(task)), reason)
        elif found.error:
            yield TaskRow(task, "failed", records.holding(task, found), found.error)
        else:
            yield TaskRow(task, "new", found)

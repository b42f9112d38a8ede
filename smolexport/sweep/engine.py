"""Where tasks run: what the driver asks of processes on this machine and of a cluster alike.

An engine neither retries nor decides: it starts a task in a fresh process and tells how that ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from smolexport.sweep.plan import Task
from smolexport.sweep.record import TaskRecord

USUAL_THREADS = 4  # of a task, where nobody says how many tasks there shall be at a time


@dataclass(frozen=True)
class TaskResult:
    """How a task ended.

    Attributes:
        record: what it tells, an error too; None where its process ended before it could, so that the same task may
            succeed in another one.  Not read from the disk, where this machine may see later what another one wrote.
        reason: how the process ended, where there is no record.
    """

    record: TaskRecord | None
    reason: str = ""


class SweepEngine(Protocol):
    """A place for tasks."""

    @property
    def jobs(self) -> int:
        """Tasks at a time."""
        ...

    @property
    def threads(self) -> int:
        """Of each task."""
        ...

    def start(self, task: Task) -> None:
        """Begin with `task` in a fresh process; at most `jobs` are under way."""
        ...

    def wait(self) -> tuple[Task, TaskResult]:
        """Wait until one of the started tasks ends."""
        ...

    def close(self) -> None:
        """End what is under way, without half files, and let go of all that is held."""
        ...


def share(cores: Sequence[int], jobs: int | None) -> tuple[int, int]:
    """Tasks at a time and threads of each, on machines with so many `cores`."""
    total, largest = sum(cores), max(cores, default=1)
    at_a_time = max(1, total // USUAL_THREADS) if jobs is None else jobs
    return at_a_time, max(1, min(total // at_a_time, largest))

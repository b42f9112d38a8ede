"""Tasks in processes on this machine, each a fresh one: what a library leaks or breaks ends with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import IO

from smolexport.errors import SessionError
from smolexport.processes import environment, fresh_python
from smolexport.sweep.engine import TaskResult, share
from smolexport.sweep.plan import Task
from smolexport.sweep.record import parsed
from smolexport.sweep.worker import GRACE
from smolexport.text import printable

STEP = 0.02  # seconds between two looks


@dataclass(frozen=True)
class Running:
    """A task and its process, whose stdout and stderr go to files that nobody has to empty."""

    task: Task
    process: subprocess.Popen[str]
    answer: IO[bytes]
    errors: IO[bytes]


class Local:
    """Processes on this machine; an `SweepEngine`."""

    def __init__(self, jobs: int | None = None, lock: int | None = None) -> None:
        """`lock`: a descriptor that the processes hold too, so that none outlives it."""
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        self.jobs, self.threads = share([usable], jobs)
        self._lock = () if lock is None else (lock,)
        self._running: list[Running] = []

    def start(self, task: Task) -> None:
        """Begin with `task`; raises SessionError where no process can be started."""
        with contextlib.ExitStack() as stack:
            try:
                answer, errors = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
                process = subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
                    fresh_python("smolexport.sweep.worker"),
                    stdin=subprocess.PIPE, stdout=answer, stderr=errors, text=True, encoding="utf-8",
                    env=environment(), pass_fds=self._lock, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                why = error.strerror or error
                raise SessionError(f"{sys.executable}: a process cannot be started: {why}") from error
            self._running.append(Running(task, process, answer, errors))
            stack.pop_all()  # open for as long as the process
        with contextlib.suppress(BrokenPipeError):  # it has died already, which `wait` will find
            _stdin(process).write(json.dumps(asdict(task)) + "\n")
            _stdin(process).flush()

    def wait(self) -> tuple[Task, TaskResult]:
        """Wait until one of them ends."""
        while True:
            for one in self._running:
                if one.process.poll() is not None:
                    self._running.remove(one)
                    return one.task, _ending(one)
            time.sleep(STEP)

    def close(self) -> None:
        """End all that is under way: asked first, killed after some seconds."""
        for one in self._running:
            one.process.terminate()
        end = time.monotonic() + GRACE
        for one in self._running:
            try:
                one.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            _let_go(one)
        self._running.clear()


def _stdin(process: subprocess.Popen[str]) -> IO[str]:
    if process.stdin is None:
        raise SessionError("the process has no stdin")
    return process.stdin


def _ending(one: Running) -> TaskResult:
    code = one.process.returncode
    one.answer.seek(0)
    answer = one.answer.read().decode("utf-8", "replace")
    errors = _let_go(one)
    if code == 0:
        with contextlib.suppress(ValueError):
            return TaskResult(parsed(answer))
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        return TaskResult(None, f"its process was ended by {name}")
    last = errors.strip().splitlines()[-1:] or ["without a word"]
    return TaskResult(None, f"its process ended with code {code}: {printable(last[0], 300)}")


def _let_go(one: Running) -> str:
    """Close everything; returns the end of what the process said on stderr."""
    with contextlib.suppress(BrokenPipeError), one.process:
        pass
    with one.answer, one.errors as errors:
        errors.seek(0, os.SEEK_END)
        errors.seek(max(0, errors.tell() - 4096))
        return errors.read().decode("utf-8", "replace")

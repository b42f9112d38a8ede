"""Tasks in processes on this machine, each a fresh one: what a library leaks or breaks ends with it.

A process, `python -m smolexport.sweep.local`, reads its task as JSON from the first line of stdin and prints its record
as JSON on stdout.  On SIGTERM, and when stdin is closed because its parent has ended, it removes what it has half
written and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from typing import IO, Any, NamedTuple, NoReturn

from smolexport.cleanup import Stopper, undo_all
from smolexport.errors import SessionError
from smolexport.processes import environment, fresh_python
from smolexport.sweep import task as tasks
from smolexport.sweep.driver import GRACE, share
from smolexport.sweep.plan import SweepConfig, Task
from smolexport.sweep.record import TaskRecord, dumped, parsed
from smolexport.text import printable

STEP = 0.02  # seconds between two polls
STOPPED = 143


class _Running(NamedTuple):
    """A task and its process, whose stdout and stderr go to files that nobody has to empty."""

    task: Task
    process: subprocess.Popen[str]
    answer: IO[bytes]
    errors: IO[bytes]


class Local:
    """A `SweepEngine` of processes on this machine."""

    def __init__(self, jobs: int | None = None, lock: int | None = None) -> None:
        """`lock`: a descriptor that the processes inherit, so that the lock outlives none of them."""
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        self.jobs, self.threads = share([usable], jobs)
        self._lock = () if lock is None else (lock,)
        self._running: list[_Running] = []

    def start(self, task: Task) -> None:
        """Start `task`; raises SessionError if no process can be started."""
        with contextlib.ExitStack() as stack:
            try:
                answer, errors = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
                process = subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
                    fresh_python("smolexport.sweep.local"),
                    stdin=subprocess.PIPE, stdout=answer, stderr=errors, text=True, encoding="utf-8",
                    env=environment(), pass_fds=self._lock, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                why = error.strerror or error
                raise SessionError(f"{sys.executable}: a process cannot be started: {why}") from error
            self._running.append(_Running(task, process, answer, errors))
            stack.pop_all()  # open for as long as the process
        stdin: Any = process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has died already, which `wait` will find
            stdin.write(json.dumps(asdict(task)) + "\n")
            stdin.flush()

    def wait(self) -> tuple[Task, TaskRecord | str]:
        """Wait for a task to end."""
        while True:
            for one in self._running:
                if one.process.poll() is not None:
                    self._running.remove(one)
                    return one.task, _outcome(one)
            time.sleep(STEP)

    def close(self) -> None:
        """Terminate all processes; kill those that have not ended some seconds later."""
        for one in self._running:
            one.process.terminate()
        end = time.monotonic() + GRACE
        for one in self._running:
            try:
                one.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            _released(one)
        self._running.clear()


def _outcome(one: _Running) -> TaskRecord | str:
    code = one.process.returncode
    one.answer.seek(0)
    answer = one.answer.read().decode("utf-8", "replace")
    errors = _released(one)
    if code == 0:
        with contextlib.suppress(ValueError):
            return parsed(answer)
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        return f"its process was ended by {name}"
    last = errors.strip().splitlines()[-1:] or ["no output on stderr"]
    return f"its process ended with code {code}: {printable(last[0], 300)}"


def _released(one: _Running) -> str:
    """Close everything; returns the end of the process's stderr."""
    with contextlib.suppress(BrokenPipeError), one.process:
        pass
    with one.answer, one.errors as errors:
        errors.seek(0, os.SEEK_END)
        errors.seek(max(0, errors.tell() - 4096))
        return errors.read().decode("utf-8", "replace")


def main() -> None:
    """Do one task: what such a process runs."""
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not part of the answer
    Stopper(lambda: SystemExit(STOPPED), _leave).install(signal.SIGTERM)
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    record = tasks.attempt(Task(**{**given, "config": SweepConfig(**given["config"])}))
    with os.fdopen(out, "w", encoding="utf-8") as answer:
        answer.write(dumped(record))


def _leave() -> NoReturn:
    undo_all()
    os._exit(STOPPED)


def _end_with_parent() -> None:
    """End when stdin is closed.  Read without `sys.stdin`, whose lock would stop the interpreter from ending."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    _leave()  # a library does not come back


if __name__ == "__main__":
    main()

"""Tasks on a Ray cluster, each in a fresh process of some machine; all of them see the same folders."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

from smolexport.errors import MissingDependencyError, SessionError, UsageError
from smolexport.sweep.driver import GRACE, share
from smolexport.sweep.plan import RAY, Task
from smolexport.sweep.record import TaskRecord, empty
from smolexport.sweep.task import attempt
from smolexport.text import first_line

STEP = 0.05  # seconds between two polls
PATIENCE = 10.0  # seconds for a machine to answer
# A cluster of our own sends no usage statistics and obeys nobody else; Ray would keep the token in the home folder.
OWN = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
OBJECTS = 80 << 20  # bytes of shared memory for objects, Ray's minimum: tasks exchange none


class Cluster:
    """A `SweepEngine` on a Ray cluster."""

    def __init__(self, jobs: int | None = None, address: str | None = None) -> None:
        """Connect to the cluster at `address` or else RAY_ADDRESS, or start one on this machine for this process.

        Raises MissingDependencyError without Ray, UsageError if no cluster answers.
        """
        given = address or os.environ.get("RAY_ADDRESS")
        if given is None:
            for name, value in OWN.items():
                os.environ.setdefault(name, value)
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        else:
            _check_answer(given)
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")  # what goes wrong comes as an exception too
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError(f"--engine ray: needs ray ({error}): {RAY}") from error
        self._ray: Any = ray
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(sys.stderr))  # Ray's remarks about dead workers go there
            stack.callback(self._shut_down)
            self._connect(given)
            self._open = stack.pop_all()
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        self.jobs, self.threads = share(cores, jobs)
        # max_calls=1: a fresh process for each task; the driver counts and reports retries
        options = {"num_cpus": self.threads, "max_calls": 1, "max_retries": 0}
        self._attempt: Any = ray.remote(**options)(attempt)
        self._running: dict[Any, Task] = {}

    def _connect(self, address: str | None) -> None:
        own = {"object_store_memory": OBJECTS, "include_dashboard": False} if address is None else {}
        try:
            with _same_signals():
                self._ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            where = f"--address {address}" if address else "this machine"
            raise UsageError(f"{where}: no Ray cluster answers ({first_line(error)})") from error

    def _shut_down(self) -> None:
        with _same_signals():
            self._ray.shutdown()

    def start(self, task: Task) -> None:
        """Start `task`."""
        self._running[self._attempt.remote(task)] = task

    def wait(self) -> tuple[Task, TaskRecord | str]:
        """Wait for a task to end; raises SessionError if the cluster no longer answers."""
        errors = self._ray.exceptions
        ready: list[Any] = []
        try:
            while not ready:
                time.sleep(STEP)  # here rather than in Ray, which turns a signal's exception into a SystemError
                ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=0)
        except errors.RayError as error:
            raise SessionError(f"the Ray cluster no longer answers: {first_line(error)}") from error
        except SystemError as error:
            raise error.__cause__ or error from None
        task = self._running.pop(ready[0])
        try:
            return task, self._ray.get(ready[0])
        except errors.RayTaskError as error:  # not of the task, whose errors are in its record, but of getting to it
            return task, empty(task, f"{task.title}: Ray could not run it: {first_line(error.cause or error)}")
        except errors.RayError as error:
            return task, f"its process ended: {first_line(error)}"

    def close(self) -> None:
        """Cancel all tasks; kill those that have not ended some seconds later."""
        with self._open:
            for force in (False, True):
                for one in self._running:
                    self._ray.cancel(one, force=force)
                if self._running:
                    _, left = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=GRACE)
                    self._running = {one: self._running[one] for one in left}


def _check_answer(address: str) -> None:
    """Refuse HOST:PORT if nothing listens there, for which Ray would wait minutes; raises UsageError."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"--address {address}: no Ray cluster answers ({first_line(error)})") from error


@contextmanager
def _same_signals() -> Iterator[None]:
    """Restore the signal handlers afterwards: Ray takes SIGTERM for itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # set from outside of Python
                signal.signal(number, handler)

"""The process in which one task of a local sweep is done.

    python -m smolexport.sweep.worker

It reads the task from the first line of stdin, as `asdict` gives it, does it, and prints its record on stdout, on one
line.  It ends, and removes what it has half written, on SIGTERM and when stdin is closed, as happens when the process
that started it is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import NoReturn

from smolexport.cleanup import Stopper, undo_all
from smolexport.sweep.plan import SweepConfig, Task

GRACE = 10.0  # seconds to remove what is half written
STOPPED = 143


def main() -> None:
    """Do one task."""
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not part of the answer
    Stopper(lambda: SystemExit(STOPPED), _leave).install(signal.SIGTERM)
    line = sys.stdin.readline()
    threading.Thread(target=_observer, daemon=True).start()
    from smolexport.sweep.record import dumped
    from smolexport.sweep.task import attempt

    given = json.loads(line)
    record = attempt(Task(**{**given, "config": SweepConfig(**given["config"])}))
    with os.fdopen(out, "w", encoding="utf-8") as answer:
        answer.write(dumped(record))


def _leave() -> NoReturn:
    undo_all()
    os._exit(STOPPED)


def _observer() -> None:
    """End with the driver.  Not through `sys.stdin`, whose lock would stop the interpreter from ending."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    _leave()  # a library does not come back


if __name__ == "__main__":
    main()

"""Peak memory of a model, measured in a fresh process.

    python -m smolexport.parity.peak_memory RUNTIME PATH [--threads N] [--context N] [--tokens N] [--options JSON]

RUNTIME is the runtime's module.  The process opens the file, feeds a block of tokens and one more, and prints a JSON
object: `runtime`, `path`, `tokens`, `load_seconds`, `peak_rss_bytes`.  The operating system reports the peak, so it
includes mapped pages that were touched, Python and the runtime's library.  A SmolexportError is printed as one line,
exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smolexport.errors import SmolexportError
from smolexport.processes import environment, fresh_python
from smolexport.run.session import Session

if TYPE_CHECKING:
    from smolexport.parity.inputs import Candidate, Progress, Settings

_MODULE = "smolexport.parity.peak_memory"
_TIMEOUT_S = 1800


def peaks(
    models: Sequence[Candidate], context: int, settings: Settings, progress: Progress
) -> list[tuple[int | None, str]]:
    """Peak resident bytes of each model in a fresh process, or None and the reason, empty if not to be measured."""
    if not settings.memory:
        return [(None, "")] * len(models)
    found = []
    for done, model in enumerate(models):
        progress("memory", done, len(models))
        found.append(measure_peak(model, threads=settings.threads, context=context))
    progress("memory", len(models), len(models))
    return found


def measure_peak(model: Candidate, *, threads: int | None = None, context: int | None = None) -> tuple[int | None, str]:
    """Return the peak resident bytes of a fresh process that runs `model`, or None and the reason."""
    module = getattr(model.runtime, "__name__", None)
    if not isinstance(module, str):
        return None, "peak memory is unknown: the runtime is not an importable module"
    command = fresh_python(_MODULE, module, str(model.path), "--options", json.dumps(dict(model.options)))
    for option, value in (("--threads", threads), ("--context", context)):
        command += [] if value is None else [option, str(value)]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module, no shell
            command, capture_output=True, text=True, env=environment(), timeout=_TIMEOUT_S, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return None, f"peak memory is unknown: {lines[-1]}"
        # a library may have printed something before
        return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_rss_bytes"]), ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"peak memory is unknown: {error}"
    except (ValueError, LookupError, TypeError):
        return None, "peak memory is unknown: the measuring process printed no figure"


def peak_rss() -> int:
    """Peak resident size of this process so far, bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    # On Linux, getrusage starts from the size of the parent (the counter survives exec, the address space does not),
    # so it is useless in a child of a process that holds models.
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the file named on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description="Peak memory of one file.")
    parser.add_argument("runtime", help="module of the runtime, e.g. smolexport_on_llamacpp")
    parser.add_argument("path", type=Path, help="exported file or checkpoint folder")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--tokens", type=int, default=64, help="length of the block (64)")
    parser.add_argument("--options", type=json.loads, default={}, help="further arguments of the runtime's open, JSON")
    options = parser.parse_args(arguments)
    open_session: Callable[..., Session] = importlib.import_module(options.runtime).open
    start = time.perf_counter()
    try:
        with open_session(options.path, threads=options.threads, context=options.context, **options.options) as session:
            load_seconds = time.perf_counter() - start
            count = min(options.tokens, session.context - 1)
            row = session.append(np.arange(count) % session.vocab_size, last_only=True)[-1]
            session.append([int(row.argmax())], last_only=True)
            peak = peak_rss()
    except SmolexportError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    facts = {"runtime": options.runtime, "path": str(options.path), "tokens": count + 1, "load_seconds": load_seconds}
    sys.stdout.write(json.dumps({**facts, "peak_rss_bytes": peak}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The fresh process in which one file's peak memory is taken.

    python -m smolexport.parity.footprint RUNTIME PATH [--threads N] [--context N] [--tokens N] [--options JSON]

RUNTIME is the runtime's module.  The file is opened, fed a block of tokens and asked for one more, and a JSON
object is printed: `runtime`, `path`, `tokens`, `load_seconds`, `peak_rss_bytes`.  The figure is the operating
system's: mapped pages that were touched count, and so do Python and the runtime's library.  A deliberate error is
printed as one line, exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from smolexport.errors import SmolexportError
from smolexport.run.session import Session

__all__ = ["main", "peak_rss"]


def peak_rss() -> int:
    """Largest resident size of this process so far, bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    # Linux's getrusage starts from the size of the process that started this one (the counter survives exec, the
    # address space does not): beside a parent that holds models it is useless
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line asks; returns the exit code."""
    options = _parser().parse_args(arguments)
    open_session: Callable[..., Session] = importlib.import_module(options.runtime).open
    start = time.perf_counter()
    try:
        with open_session(
            options.path, threads=options.threads, context=options.context, **json.loads(options.options)
        ) as session:
            load_seconds = time.perf_counter() - start
            count = min(options.tokens, session.context - 1)
            row = session.append(np.arange(count) % session.vocab_size, last_only=True)[-1]
            session.append([int(row.argmax())], last_only=True)
            peak = peak_rss()
    except SmolexportError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    facts = {
        "runtime": options.runtime,
        "path": str(options.path),
        "tokens": count + 1,
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak,
    }
    sys.stdout.write(json.dumps(facts) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m smolexport.parity.footprint", description="Peak memory of one file."
    )
    parser.add_argument("runtime", help="module of the runtime, e.g. smolexport_on_llamacpp")
    parser.add_argument("path", type=Path, help="the exported file or the checkpoint's folder")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--context", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=64, help="length of the block (64)")
    parser.add_argument("--options", default="{}", help="further arguments of the runtime's open, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())

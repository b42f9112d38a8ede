"""The machine: its description, its memory bandwidth, the versions of the runtimes."""

from __future__ import annotations

import platform
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from smolexport.run.session import Runtime, choose_threads

READ = 256 << 20  # bytes, more than the processor's caches hold
TIMES = 5


def bandwidth(threads: int | None = None) -> float:
    """Memory read bandwidth of `threads` together, bytes per second, best of several runs; None: one per core."""
    parts = np.array_split(np.ones(READ // 4, np.float32), choose_threads(threads))
    rates = []
    for _ in range(TIMES):
        workers = [threading.Thread(target=np.max, args=(part,)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        rates.append(READ / (time.perf_counter() - start))
    return max(rates)


def machine_facts(runtimes: Iterable[Runtime], threads: int | None) -> dict[str, str]:
    """System, processor, cores, threads, memory, and the versions of `runtimes`, as text."""
    import psutil

    from smolexport.conversion.model_card import installed_version

    logical, physical = psutil.cpu_count() or 1, psutil.cpu_count(logical=False)
    facts = {
        "smolexport": installed_version(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "processor": _processor(),
        "cores": f"{logical} logical" + (f", {physical} physical" if physical else ""),
        "threads": str(choose_threads(threads)),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
    }
    return facts | {runtime.NAME: runtime.version() for runtime in runtimes}


def _processor() -> str:
    """Its model name if the system reports one, and its architecture."""
    found = None
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
    return f"{found[1] if found else platform.processor() or 'unknown'} ({platform.machine()})"

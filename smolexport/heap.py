"""Return memory that the process no longer needs to the system; does nothing where that is not possible."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

MAPPINGS = Path("/proc/self/smaps")
MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-[x-]p \S+ \S+ \S+ +(.*)")  # private, and never written to
MADV_DONTNEED = 4  # on Linux, the only system with that file
M_ARENA_MAX = -8  # of glibc's mallopt


def give_back_heap() -> None:
    """Return the free part of the heap (glibc only)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def share_heap() -> None:
    """Let all threads share one heap (glibc only); affects the whole process, so only commands call it.

    With a heap of its own each encoding thread keeps the arrays of its largest chunk: 30 MB on sixteen processors.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def give_back_library(name: str) -> None:
    """Return the pages that loading the shared library `name` (without suffixes, e.g. `libllvmlite`) has read.

    For a library as large as LLVM these are 30 MB of code, constants and relocations, most of which are never used
    again.  They stay in the system's page cache; each one that is touched again costs a minor fault.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        advise = ctypes.CDLL(None).madvise
        for start, stop in _unchanged(name):
            advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED)


def _unchanged(name: str) -> Iterator[tuple[int, int]]:
    """Address range of each mapping of the library without private pages (relocated data, breakpoints): they would be
    lost.
    """
    mapping = None
    for line in MAPPINGS.read_text(encoding="utf-8", errors="replace").splitlines():
        if found := MAPPING.match(line):
            ours = Path(found[3]).name.split(".")[0] == name
            mapping = (int(found[1], 16), int(found[2], 16)) if ours else None
        elif line.startswith("Anonymous:") and mapping:
            if line.split()[1] == "0":
                yield mapping
            mapping = None

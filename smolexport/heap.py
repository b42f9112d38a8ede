"""Giving memory back to the system that the process holds on to without need; a no-op where it cannot be asked to."""

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
    """What is free in the heap.  Only glibc can be asked to."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def share_heap() -> None:
    """One heap for all threads: what one has freed, the others use.  For the whole process, so not for a library to do.

    With a heap of its own each encoding thread keeps the arrays of its largest chunk: 30 MB on sixteen processors.
    Only glibc can be asked to.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def give_back_library(name: str) -> None:
    """What loading the shared library `name` has read of its file: code, constants, tables of the linker.

    Of a library as large as LLVM that is 30 MB, most of it for good: constructors, relocations.  The pages remain in
    the system's cache, and those that are touched again are mapped from there, at no more than a fault each.

    Args:
        name: the file's name without its endings, e.g. `libllvmlite`.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        advise = ctypes.CDLL(None).madvise
        for start, stop in _unchanged(name):
            advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED)


def _unchanged(name: str) -> Iterator[tuple[int, int]]:
    """First and last address of each mapping of the library that holds no page of the process's own, which would be
    lost: what the linker has filled in, a debugger's breakpoints.
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

"""How kernels of this package are compiled: without the GIL, strict float32, cached on disk where that is possible.

numba keeps compiled kernels in `NUMBA_CACHE_DIR`, else in `__pycache__` beside the source, else in the user's cache
folder.  Where none of them can be written (a read-only install run by a user without a home) it refuses to decorate
the function at all; `kernel` then compiles in memory, once per process, and nothing else changes.

numba decides by the date of a kernel's own file whether a cached kernel is stale, although the kernels here are made of
helpers from several files.  `kernel` therefore stamps them with the newest date and the total size of all files of this
folder and the kernel's own, so that editing a helper recompiles the kernels that contain it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from smolexport.heap import give_back_library

give_back_library("libllvmlite")  # kernels from the cache need little of the compiler

Array = NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

# numpy's division (x/0 is inf or nan, never an exception) is what the C arithmetic does; fastmath stays off, so LLVM
# neither reorders sums nor contracts a*b + c.
OPTIONS = {"nogil": True, "error_model": "numpy"}

# Arguments of an `instruction` other than a numba type.
ARRAY, CONSTANT = "array", "constant"


def kernel(function: F) -> F:
    """Compile `function` at its first call and keep the machine code on disk if any cache folder is writable."""
    try:
        compiled = numba.njit(cache=True, no_cfunc_wrapper=True, **OPTIONS)(function)
    except RuntimeError:  # "no locator available": there is nowhere to write
        return cast(F, numba.njit(**OPTIONS)(function))
    file: Any = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if hasattr(file, "_source_stamp"):
        file._source_stamp = folder_stamp(Path(function.__code__.co_filename).parent)
    return cast(F, compiled)


def helper(function: F) -> F:
    """Compile `function` as a part of the kernels that call it; it has no cache entry of its own."""
    return cast(F, numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function))


def lean_helper(function: F) -> F:
    """A `helper` that counts no references to arrays, for what is called for every tile of a few blocks.

    Counting takes an atomic operation per argument and slice, as long as the arithmetic on a vector or two.  Without it
    a helper can neither make nor return an array.
    """
    return cast(F, numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False, **OPTIONS)(function))


def instruction(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """A function for kernels made of LLVM instructions, which the decorated function emits with llvmlite's builder.

    Args:
        result: numba type of what it returns.
        arguments: numba types of what it takes.  Of an ARRAY, of any type, the decorated function gets a pointer to the
            first element; of a CONSTANT, which must be known when the kernel is compiled, its value.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        @wraps(emit)  # numba reads the names of the arguments and puts its typing context where `builder` is
        def typed(_context: Any, *found: Any) -> Any:
            kinds = [f if a in (ARRAY, CONSTANT) else a for a, f in zip(arguments, found, strict=True)]
            if not all(
                isinstance(k, types.IntegerLiteral) for a, k in zip(arguments, kinds, strict=True) if a is CONSTANT
            ):
                return None

            def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
                values = [
                    context.make_array(kind)(context, builder, value).data
                    if argument is ARRAY
                    else kind.literal_value
                    if argument is CONSTANT
                    else value
                    for argument, kind, value in zip(arguments, kinds, args, strict=True)
                ]
                made = emit(builder, *values)
                return context.get_dummy_value() if result == types.void else made

            return result(*kinds), generate

        return intrinsic(typed)

    return decorate


@cache
def folder_stamp(home: Path) -> tuple[float, int]:
    """Newest modification time [s] and total size [bytes] of the sources here and in `home`, only for comparison."""
    stats = [file.stat() for folder in {Path(__file__).parent, home} for file in folder.glob("*.py")]
    return max((s.st_mtime for s in stats), default=0.0), sum(s.st_size for s in stats)

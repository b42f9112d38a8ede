"""The extremes of WIDTH groups at once, group g in lane g.

A reduction of one vector to one number halves it again and again and ends in lanes that hold nothing of use.  Here two
vectors are halved into one, so that every instruction works on full vectors and the numbers arrive side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray

from smolexport.quant.jit import instruction, lean_helper
from smolexport.quant.lanes import VALUES, WIDTH, lanes, splat, where

INFINITY = np.float32(np.inf)


def paired(builder: Any, first: Any, second: Any, groups: int, symbol: str) -> Any:
    """The halves of each field of two vectors of `groups` fields, compared: one vector of 2 * `groups` fields."""
    field = WIDTH // groups
    sides = []
    for start in (0, field // 2):
        picks = [begin + start + i for begin in range(0, 2 * WIDTH, field) for i in range(field // 2)]
        order = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), picks)
        sides.append(builder.shuffle_vector(first, second, order))
    return builder.select(builder.fcmp_ordered(symbol, *sides), *sides)


@lean_helper
def extremes_of_groups(array: NDArray[Any], start: int, group: int) -> Any:
    """Lanes (smallest, largest) of WIDTH groups of `group` elements from `array[start]` on; of zeros, any of them."""
    low, high = splat(INFINITY), splat(-INFINITY)
    for e in range(start, start + group, WIDTH):
        least, most = extremes_of_rows(array, e, group)
        low, high = where(least < low, least, low), where(most > high, most, high)
    return low, high


@instruction
def extremes_of_rows(_context: Any, array: Any, _index: Any, _stride: Any) -> Any:
    """(smallest, largest) of each `array[i + g * stride : i + g * stride + WIDTH]`."""
    pair = types.UniTuple(lanes, 2)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, index, stride = args
        start = builder.gep(context.make_array(signature.args[0])(context, builder, array).data, [index])

        def reduced(first: int, count: int) -> tuple[Any, Any]:
            if count == 1:
                place = builder.gep(start, [builder.mul(stride, ir.Constant(stride.type, first))])
                value = builder.load(builder.bitcast(place, VALUES.as_pointer()), align=4)
                return value, value
            half = count // 2
            (low, high), (other_low, other_high) = reduced(first, half), reduced(first + half, half)
            return paired(builder, low, other_low, half, "<"), paired(builder, high, other_high, half, ">")

        return cgutils.pack_array(builder, reduced(0, WIDTH))

    return pair(array, types.intp, types.intp), generate

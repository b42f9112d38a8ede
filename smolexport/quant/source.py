"""Reading weights of any of the three storage types as float32, a tile at a time.

Every kernel takes its weights as `(f32, u16, kind)`: one of the two flat arrays is the tensor and the other is empty,
so that one compiled kernel serves float32, float16 and bfloat16 without a float32 copy of the tensor.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from smolexport.quant.half import widen_bf16, widen_f16
from smolexport.quant.jit import lean_helper
from smolexport.quant.lane_codes import half_value, load_halves
from smolexport.quant.lane_floats import load_brains
from smolexport.quant.lanes import WIDTH, load, store

F32, F16, BF16 = 0, 1, 2


@lean_helper
def fetch(f32: NDArray[Any], u16: NDArray[Any], kind: int, start: int, into: NDArray[Any]) -> None:
    """Fill `into` (float32) with the elements from `start` on."""
    whole = into.size // WIDTH * WIDTH
    if kind == F32:
        for i in range(0, whole, WIDTH):
            store(into, i, load(f32, start + i))
        for i in range(whole, into.size):
            into[i] = f32[start + i]
    elif kind == F16:
        for i in range(0, whole, WIDTH):
            store(into, i, half_value(load_halves(u16, start + i)))
        for i in range(whole, into.size):
            into[i] = widen_f16(u16[start + i])
    else:
        for i in range(0, whole, WIDTH):
            store(into, i, load_brains(u16, start + i))
        for i in range(whole, into.size):
            into[i] = widen_bf16(u16[start + i])

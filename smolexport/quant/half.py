"""Bits of float16 and bfloat16 to and from float32, as pieces of kernels.

The rounding is to nearest even and equals the F16C instructions for everything but the payload of a NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from smolexport.quant.jit import helper, instruction

TWO_POW_112 = np.float32(2.0**112)
HALF = np.float32(0.5)


@instruction
def bits_of(_context: Any, x: Any) -> Any:
    """The uint32 with the bits of the float32 `x`."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return (types.uint32(types.float32), generate) if x == types.float32 else None


@instruction
def float_of(_context: Any, bits: Any) -> Any:
    """The float32 with the bits of the uint32 `bits`."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return (types.float32(types.uint32), generate) if bits == types.uint32 else None


@helper
def widen_bf16(bits: np.uint16) -> Any:
    """The float32 value of bfloat16 bits."""
    return float_of(np.uint32(np.uint32(bits) << np.uint32(16)))


@helper
def widen_f16(bits: np.uint16) -> Any:
    """The float32 value of float16 bits."""
    wide = np.uint32(bits)
    magnitude = np.uint32((wide & np.uint32(0x7FFF)) << np.uint32(13))
    finite = bits_of(float_of(magnitude) * TWO_POW_112)  # exact: moves the exponent's bias, subnormals included
    special = (wide & np.uint32(0x7C00)) == np.uint32(0x7C00)
    value = np.uint32(magnitude | np.uint32(0x7F800000)) if special else finite
    return float_of(np.uint32(value | ((wide & np.uint32(0x8000)) << np.uint32(16))))


@helper
def narrow_f16(x: np.float32) -> np.uint16:
    """float16 bits nearest to `x`, ties to even; a NaN becomes the plain quiet one with the sign of `x`."""
    bits = bits_of(x)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # Below 2^-14 adding 0.5, whose unit in the last place is 2^-24, rounds to the grid of the subnormals.
    tiny = np.uint32(bits_of(float_of(magnitude) + HALF) - np.uint32(0x3F000000))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
    rounded = tiny if magnitude < np.uint32(0x38800000) else normal
    rounded = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else rounded
    rounded = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else rounded
    return np.uint16(rounded | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


@helper
def narrow_bf16(x: np.float32) -> np.uint16:
    """bfloat16 bits nearest to `x`, ties to even; a NaN is made quiet and keeps its upper bits."""
    bits = bits_of(x)
    top = np.uint32(bits >> np.uint32(16))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + (top & np.uint32(1))) >> np.uint32(16))
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(top | np.uint32(64)) if is_nan else rounded)

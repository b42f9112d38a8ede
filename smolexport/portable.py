"""Portable weights: what every format stores alike, so that an `int4` or `int8` file is the same model everywhere.

One lattice carries the matrices: blocks of 32 consecutive weights share a float16 scale and hold 4- or 8-bit integers
around zero.  Each format has a layout that keeps exactly these integers and scales (GGUF: Q4_0 and Q8_0; MLX: affine
with group 32, float16 scales and biases of -8 or -128 scales).  The choices that could differ are made here, once:

- the embedding and an untied head take 8 bits also in `int4`: a tied embedding is the output layer as well, the part
  of a small model that 4 bits hurt most;
- rows that are no multiple of 32, norms and biases are rounded to float16, which all formats can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from smolexport.quant import FORMATS, RowFormat
from smolexport.spec import Role, Tensor

__all__ = ["NOTE", "SCHEMES", "Storage", "storage_of", "wanted_of"]

BLOCK = 32
SCHEMES: Mapping[str, str] = {
    "int4": "4 bits, blocks of 32, portable: the same weights in every format; embedding and head 8 bits",
    "int8": "8 bits, blocks of 32, portable: the same weights in every format; nearly lossless",
}
NOTE = "portable: every format holds these very weights; embedding and head have 8 bits, norms and biases are float16"


class Storage(Enum):
    """How a tensor is stored; the value names the format that defines the rounding."""

    INT4 = "q4_0"
    INT8 = "q8_0"
    HALF = "f16"

    @property
    def lattice(self) -> RowFormat:
        """The format whose rounding this is."""
        return FORMATS[self.value]


def wanted_of(tensor: Tensor, scheme: str) -> Storage:
    """What `scheme`, a name of `SCHEMES`, stores `tensor` as if its rows are whole blocks."""
    if len(tensor.shape) == 1:
        return Storage.HALF
    return Storage.INT4 if scheme == "int4" and tensor.role not in (Role.EMBED, Role.HEAD) else Storage.INT8


def storage_of(tensor: Tensor, scheme: str) -> Storage:
    """What `scheme` stores `tensor` as."""
    wanted = wanted_of(tensor, scheme)
    return wanted if tensor.shape[-1] % BLOCK == 0 else Storage.HALF

"""Portable weights: what every format stores alike, so that an `int4` or `int8` file is the same model everywhere.

All formats store the same codes: blocks of 32 consecutive weights share a float16 scale and hold 4- or 8-bit integers
around zero (GGUF: Q4_0 and Q8_0; MLX: affine with group 32, float16 scales and biases of -8 or -128 scales).  What
formats could choose differently is decided here, once:

- the embedding and an untied head take 8 bits also in `int4`: a tied embedding is the output layer as well, the part
  of a small model that 4 bits hurt most;
- rows that are not a multiple of 32, norms and biases are rounded to float16, which all formats can hold.

The scheme `auto-bits` leaves the number of bits of each matrix to its caller.  With 4 and 8 bits it is portable as
well; 5 and 6 bits differ from format to format, GGUF's are named here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

from smolexport.conversion.converter import Choice
from smolexport.errors import UsageError
from smolexport.model.spec import Role, Tensor
from smolexport.quant import FORMATS, RowFormat

BLOCK = 32
SCHEMES: Mapping[str, str] = {
    "int4": "4 bits, blocks of 32, portable: the same weights in every format; embedding and head 8 bits",
    "int8": "8 bits, blocks of 32, portable: the same weights in every format; nearly lossless",
}
AUTO_BITS = "auto-bits"
AUTO_BITS_ABOUT = "4 to 8 bits, chosen tensor by tensor; needs --size or --target-kld"
NAMES = (*SCHEMES, AUTO_BITS)
BIT_CHOICES = (8, 4)  # bits that every format holds alike
NOTE = "portable: every format holds these very weights; embedding and head have 8 bits, norms and biases are float16"


class Storage(Enum):
    """How a tensor is stored; the value names the format that defines the rounding."""

    INT4 = "q4_0"
    INT5 = "q5_0"
    INT6 = "q6_k"
    INT8 = "q8_0"
    HALF = "f16"

    @property
    def canonical(self) -> RowFormat:
        """The format that defines the rounding."""
        return FORMATS[self.value]


Bits = Mapping[Tensor, int]
OF_BITS: Mapping[int, Storage] = {4: Storage.INT4, 5: Storage.INT5, 6: Storage.INT6, 8: Storage.INT8}


def decided(bits: Bits | None) -> Bits:
    """The bits of a model for `auto-bits`; raises UsageError if there are none."""
    if bits is None:
        raise UsageError(
            f"-q {AUTO_BITS}: chooses bits tensor by tensor; give --size or --target-kld, and --stats STATS"
        )
    return bits


def requested_of(tensor: Tensor, scheme: str, bits: Bits | None = None) -> Storage:
    """What `scheme`, of `SCHEMES` or `auto-bits` with `bits`, stores `tensor` as if its rows are whole blocks."""
    if not tensor.is_matrix:
        return Storage.HALF
    if scheme == AUTO_BITS:
        return OF_BITS[decided(bits).get(tensor, 8)]
    return Storage.INT4 if scheme == "int4" and tensor.role not in (Role.EMBED, Role.HEAD) else Storage.INT8


def storage_of(tensor: Tensor, scheme: str, bits: Bits | None = None) -> Storage:
    """What `scheme` stores `tensor` as; arguments as for `requested_of`."""
    return requested_of(tensor, scheme, bits) if tensor.shape[-1] % BLOCK == 0 else Storage.HALF


def choose(tensor: Tensor, scheme: str, bits: Bits | None, formats: Callable[[Storage], RowFormat]) -> Choice:
    """The choice of `scheme` in a target that stores each kind of `Storage` in the format that `formats` names."""
    return Choice(formats(storage_of(tensor, scheme, bits)), formats(requested_of(tensor, scheme, bits)))

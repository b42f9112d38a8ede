"""Formats of quantized rows and their codecs: encode and decode, always both.

```
formats.py     the table of formats, argument checks            plain.py    f32 f16 bf16
jit.py         how kernels are compiled and cached              q8.py       q8_0
half.py        float16 and bfloat16 bits                        round32.py  q4_0 q4_1 q5_0 q5_1
source.py      tiles of weights as float32    iq4.py      iq4_nl
lanes.py       SIMD vectors as a numba type                     q2_k.py     q2_k
lane_codes.py  integers in such vectors: codes, bit fields      q3_k.py     q3_k
tile.py        blocks to lanes and back                         q45_k.py    q4_k q5_k
search.py      scale searches, one group per lane               q6_k.py     q6_k
superblock.py  what the k formats share
```

Formats whose rows keep codes and scales apart, as MLX and, in the last two lines, ONNX Runtime store them:

```
parted.py      what they share             affine.py, affine_kernels.py    affine groups, 2 to 8 bits
rowparts.py    places in a row, floats     affine_grids.py                 scales and biases as MLX chooses them
bitstream.py   codes as a bit stream       affine_search.py                better ones
lane_floats.py small floats in lanes       microscale*.py                  mxfp4 nvfp4 mxfp8
                                           portable*.py                    q4_0 and q8_0 as affine groups
                           nbits*.py                       MatMulNBits, 4 and 8 bits; q4_0 and q8_0 so
                           channel*.py                     MatMulInteger: 8 bits, one scale a row
```

For what looks for better codes or scales: `grids.py` shows any of these formats with less than 8 bits as a grid of
values, and rebuilds its rows from codes or from scales; `grid_layouts.py` knows where each format keeps them.
"""

from __future__ import annotations

from smolexport.quant.affine import AffineFormat
from smolexport.quant.channel import ChannelFormat
from smolexport.quant.formats import FORMATS, BlockFormat, Part, RowFormat, first_nonfinite, largest
from smolexport.quant.microscale import MicroFormat
from smolexport.quant.nbits import NBits, PortableNBits
from smolexport.quant.portable import PortableFormat

__all__ = [
    "FORMATS",
    "AffineFormat",
    "BlockFormat",
    "ChannelFormat",
    "MicroFormat",
    "NBits",
    "Part",
    "PortableFormat",
    "PortableNBits",
    "RowFormat",
    "first_nonfinite",
    "largest",
]

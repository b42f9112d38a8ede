"""Formats of quantized rows and their codecs: encode and decode, always both.

```
formats.py     the table of formats, argument checks
jit.py         how kernels are compiled and cached
half.py        float16 and bfloat16 bits
source.py      tiles of weights as float32
lanes.py       SIMD vectors as a numba type
lane_codes.py  integers in such vectors: codes, bit fields
tile.py        blocks to lanes and back
search.py      scale searches, one group per lane
superblock.py  what the k formats share
plain.py  q8.py  legacy_quants.py (q4_0 q4_1 q5_0 q5_1)  iq4.py  q2_k.py  q3_k.py  q4_k_q5_k.py  q6_k.py
```

Planar formats keep codes and scales of a row apart, as MLX and ONNX Runtime do:

```
planar.py, planar_io.py    what they share: places in a row, floats
bitstream.py               codes as a bit stream
lane_floats.py             small floats in lanes
affine*.py                 affine groups, 2 to 8 bits: kernels, MLX's scales and biases, a search for better ones
microscale*.py             mxfp4 nvfp4 mxfp8
portable*.py               q4_0 and q8_0 as affine groups
nbits*.py                  MatMulNBits, 4 and 8 bits; q4_0 and q8_0 stored so
channel*.py                MatMulInteger: 8 bits, one scale per row
```

`affine_view.py` shows any format with less than 8 bits as a grid of values, for methods that choose codes or scales
themselves, and rebuilds its rows; `bit_layouts.py` knows where each format keeps them.
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

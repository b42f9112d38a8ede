"""Block formats of GGUF files and their codecs: encode and decode, always both.

```
formats.py     the table of formats, argument checks            plain.py    f32 f16 bf16
jit.py         how kernels are compiled and cached              q8.py       q8_0
half.py        float16 and bfloat16 bits                        round32.py  q4_0 q4_1 q5_0 q5_1
source.py      tiles of weights as float32; the finite check    iq4.py      iq4_nl
lanes.py       SIMD vectors as a numba type                     q2_k.py     q2_k
lane_codes.py  integers in such vectors: codes, bit fields      q3_k.py     q3_k
tile.py        blocks to lanes and back                         q45_k.py    q4_k q5_k
search.py      scale searches, one group per lane               q6_k.py     q6_k
superblock.py  what the k formats share
```
"""

from __future__ import annotations

from smolexport.quant.formats import FORMATS, BlockFormat, first_nonfinite

__all__ = ["FORMATS", "BlockFormat", "first_nonfinite"]

"""Codecs of rows, compiled by numba at their first use.

```
jit.py         how kernels are compiled and cached
lanes.py       SIMD vectors as a numba type
codes.py       integers in such vectors: codes, bit fields, bit streams
floats.py      float16, bfloat16 and float8, one at a time and in vectors
tile.py        between memory and vectors: reading weights, writing blocks and parts
search.py      searches for scales, one group per lane
superblock.py  what the k formats share
```

The other modules are named after their formats.
"""

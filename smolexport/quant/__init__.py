"""Formats of quantized rows and their codecs: encode and decode, always both.

```
formats.py      what a format is, and GGUF's block formats
planar.py       formats that keep codes and scales of a row apart: MLX's and ONNX Runtime's
arrays.py       checks of the arrays in front of the kernels
kernels/        the codecs, compiled at their first use
affine_view.py  any format with less than 8 bits as a grid of values, for methods that choose codes or scales themselves
bit_layouts.py  where each format keeps them
```

`formats` and `planar` import neither NumPy nor numba; `kernels` alone imports numba.
"""

from __future__ import annotations

from smolexport.quant.formats import FORMATS, BlockFormat, Part, RowFormat

__all__ = ["FORMATS", "BlockFormat", "Part", "RowFormat"]

"""The MLX converter passes the suite that every converter must pass."""

from __future__ import annotations

from typing import ClassVar

import smolexport_to_mlx
from smolexport.conversion.converter import Converter
from smolexport.testing.converters import ConverterTests


class TestMlx(ConverterTests):
    """All architectures; lossy schemes with the error that their bits allow."""

    converter: ClassVar[Converter] = smolexport_to_mlx
    exact = "f32"
    coarse: ClassVar = {
        "bf16": 0.004, "int8": 0.006, "int4": 0.12, "q8": 0.01, "q6_g32": 0.03, "q4": 0.12, "q2_g32": 0.5,
        "mixed_3_6": 0.25, "mxfp4": 0.16, "nvfp4": 0.14, "mxfp8": 0.04,
    }  # fmt: skip

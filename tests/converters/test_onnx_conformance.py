"""The ONNX converter passes the suite that every converter must pass."""

from __future__ import annotations

from typing import ClassVar

import smolexport_to_onnx
from smolexport.conversion.converter import Converter
from smolexport.testing.converters import ConverterTests


class TestOnnx(ConverterTests):
    """All architectures; lossy schemes with the error that their bits allow."""

    converter: ClassVar[Converter] = smolexport_to_onnx
    exact = "f32"
    coarse: ClassVar = {
        "f16": 0.001, "int8": 0.006, "int4": 0.12, "int4-pure": 0.12, "q4f16": 0.12, "int4-asym": 0.11,
        "int4-g64": 0.14, "int4-asym-g128": 0.13, "int8+int4": 0.006, "int8-dynamic": 0.01, "int8-dynamic+int4": 0.01,
    }  # fmt: skip

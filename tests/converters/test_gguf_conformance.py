"""The GGUF converter passes the suite that every converter must pass."""

from __future__ import annotations

from typing import ClassVar

import smolexport_to_gguf
from smolexport.conversion.converter import Converter
from smolexport.testing.converters import ConverterTests


class TestGguf(ConverterTests):
    """All architectures; lossy schemes with the error that their bits allow."""

    converter: ClassVar[Converter] = smolexport_to_gguf
    exact = "f32"
    coarse: ClassVar = {"bf16": 0.004, "q8_0": 0.006, "q6_k": 0.02, "q5_k": 0.05, "q4_0": 0.12, "iq4_nl": 0.1}

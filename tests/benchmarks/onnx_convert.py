"""One conversion to an ONNX folder beside onnxruntime-genai's own builder, at a published model's true shape.

    python -m tests.benchmarks.onnx_convert SmolLM2-1.7B int4 --tokenizer FOLDER

Writes a random bf16 checkpoint of that shape, converts it with `smolexport onnx` and with the command
`python -m onnxruntime_genai.models.builder`, each in a fresh process, in turns, and prints wall time, CPU time, peak
resident memory and the size of what was written, with their ratios.  Memory is also told above that of an interpreter
that imports nothing.  The weights are not compared: the builder has a lattice of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks import conversion

# What the command `python -m onnxruntime_genai.models.builder` does, in a process that can tell its figures after it.
THEIRS = """
import runpy
folder, out, precision = sys.argv[1:]
sys.argv = ["builder", "-i", folder, "-o", out, "-p", precision, "-e", "cpu", "-c", out + "/cache"]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
"""
# What the builder is told for the same scheme.
SCHEMES: Mapping[str, str] = {"int4": "int4", "f32": "fp32"}


def measure(name: str, scheme: str, tokenizer: Path, scratch: Path, repetitions: int = 3) -> dict[str, Any]:
    """Convert the shape `name` with both; median figures and ratios."""
    both = {"ours": (conversion.OURS, "onnx", scheme), "theirs": (THEIRS, SCHEMES[scheme])}
    figures = conversion.measure(name, tokenizer, scratch, repetitions, both)
    figures.pop("differing")
    return {"scheme": scheme, **figures}


if __name__ == "__main__":
    conversion.command_line(__doc__ or "", "genai builder", SCHEMES, "int4", measure)

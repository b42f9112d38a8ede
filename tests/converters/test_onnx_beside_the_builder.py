"""What a conversion costs beside onnxruntime-genai's own builder, which loads the whole model into torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import onnx_convert


def test_the_135m_shape(shared: Path, tmp_path: Path) -> None:
    """Far less at the size of 1.7B; `python -m tests.benchmarks.onnx_convert` prints both."""
    for library in ("onnxruntime_genai", "torch", "transformers", "onnx_ir"):
        pytest.importorskip(library, reason=f"the builder needs {library}")
    found = onnx_convert.measure("SmolLM2-135M", "int4", shared / "smollm2-tokenizer", tmp_path, repetitions=1)
    assert found["ratio"]["cpu"] < 0.3
    assert found["ratio"]["rss"] < 0.2

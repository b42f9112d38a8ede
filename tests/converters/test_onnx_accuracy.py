"""What rounding the activations adds: the same weights at `accuracy_level` 0 (floats) and 4 (8 bits), beside llama.cpp.

Printed too (`pytest -s`): mean KLD against the bf16 checkpoint, nats per token, which is what
`smolexport compare CHECKPOINT FILE...` says of the same files.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import smolexport
from smolexport.demo import demo_text
from smolexport.parity.inputs import Settings

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "


@pytest.fixture(params=["demo", "stories260K"])
def trained(request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A trained checkpoint with words that it has something to say about."""
    for library in ("torch", "llama_cpp", "onnxruntime"):
        pytest.importorskip(library)
    if request.param == "demo":
        return request.getfixturevalue("demo"), demo_text()
    shared: Path = request.getfixturevalue("shared")
    return shared / "stories260K" / "hf_bf16", STORY * 12


def divergences(trained: tuple[Path, str], quant: str, out: Path) -> tuple[float, float, float]:
    """Mean KLD of the GGUF file and of the folders at accuracy_level 0 and 4."""
    folder, text = trained
    paths = [smolexport.export("gguf", folder, out / f"{quant}.gguf", quant=quant).path]
    for level in (0, 4):
        options = {"accuracy_level": level}
        made = smolexport.export("onnx", folder, out / f"{quant}-{level}-onnx", quant=quant, options=options)
        paths.append(made.path)
    settings = Settings(repetitions=0, memory=False, greedy_tokens=0, threads=1, max_windows=6)
    sheet = smolexport.compare(folder, paths, text=text, settings=settings)
    gguf, floats, integers = (candidate.accuracy.kld.mean.value for candidate in sheet.candidates)
    print(f"{quant}: GGUF {gguf:.6f}, accuracy_level 0 {floats:.6f}, accuracy_level 4 {integers:.6f}")
    return gguf, floats, integers


def test_at_8_bits_it_is_nearly_half_of_the_error(trained: tuple[Path, str], tmp_path: Path) -> None:
    gguf, floats, integers = divergences(trained, "int8", tmp_path)
    assert floats < 0.9 * integers
    assert max(gguf, integers) <= 0.002
    assert integers == pytest.approx(gguf, rel=0.2)  # llama.cpp rounds them too, in its own way


def test_at_4_bits_it_is_nothing_beside_the_weights(trained: tuple[Path, str], tmp_path: Path) -> None:
    gguf, floats, integers = divergences(trained, "int4", tmp_path)
    assert floats > 0.001
    assert integers == pytest.approx(gguf, rel=0.05)
    assert floats == pytest.approx(gguf, rel=0.05)

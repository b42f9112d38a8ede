"""Tensor bytes equal to llama.cpp's two-step path: our f32 (bf16) file through `llama_model_quantize`.

Axes: all schemes x four architectures (rows of 256 and more), the row lengths of 135M and 360M (fall-backs) and, for
two schemes, of 1.7B; bf16, f16 and f32 checkpoints; widths other than multiples of 32.  Compared: every tensor's type
and bytes, and that the tokenizer metadata came through.  Not compared: the order of tensors, which llama.cpp sorts.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest

from smolexport.conversion import portable
from smolexport.conversion.pipeline import export
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from smolexport_to_gguf.container import GgufFile, read_gguf
from smolexport_to_gguf.schemes import SCHEMES
from tests.converters.llama_quantize import oracle

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="bytes are defined by the x86-64 build of llama.cpp"
)
# Portable schemes are our own; what needs an importance matrix is in `test_gguf_imatrix.py`.
OWN = (*portable.SCHEMES, portable.AUTO_BITS)
QUANTIZED = [s for s in SCHEMES.values() if s.quantized and s.name not in OWN and not s.needs_importance]
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "bf16", WIDE | {"num_hidden_layers": 9, "num_key_value_heads": 1}),
    "llama biases": ("llama", "bf16", WIDE | {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2}),
    "llama untied": ("llama", "f32", WIDE | {"tie_word_embeddings": False}),
    "smollm3": ("smollm3", "bf16", {k: v for k, v in WIDE.items() if k != "head_dim"}),
    "qwen2": ("qwen2", "bf16", {k: v for k, v in WIDE.items() if k != "head_dim"}),
    "qwen3": ("qwen3", "f16", WIDE | {"head_dim": 128}),
    "rows of 135M": ("llama", "bf16", {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "num_hidden_layers": 3}),
    "rows of 360M": ("llama", "bf16", {
        "hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5,
        "num_hidden_layers": 1}),
    "rows of 1.7B": ("llama", "bf16", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32,
        "num_hidden_layers": 1}),
    "rows of 172": ("llama", "bf16", {"intermediate_size": 172, "num_hidden_layers": 2}),
}  # fmt: skip


def blocks(file: GgufFile, name: str) -> bytes:
    info = file.tensors[name]
    with file.path.open("rb") as stream:
        stream.seek(info.offset)
        return stream.read(info.nbytes)


def plain(entry: tuple[str, Any]) -> tuple[str, Any]:
    kind, value = entry
    return kind, value.tolist() if hasattr(value, "tolist") else value


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_equals_the_two_step_path(case: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model_type, dtype, overrides = CASES[case]
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    folder = write_checkpoint(tmp_path / "model", model_type, dtype=dtype, seed=5, tokenizer=tokenizer, **overrides)
    # bf16 checkpoints go through a bf16 file, all others through f32.
    wide = export("gguf", folder, tmp_path / "wide.gguf", quant="bf16" if dtype == "bf16" else "f32").path
    # One layer of 1.7B is 67 million weights, seconds for the C quantizer: only the scheme that people use there.
    schemes = [SCHEMES["q4_k_m"], SCHEMES["q8_0"]] if case == "rows of 1.7B" else QUANTIZED
    oracle(wide, tmp_path / "theirs.gguf", [s.file_type for s in schemes])
    for scheme in schemes:
        ours = read_gguf(export("gguf", folder, tmp_path / "ours.gguf", quant=scheme.name, force=True).path)
        theirs = read_gguf(tmp_path / f"theirs.gguf.{scheme.file_type}")
        assert set(ours.tensors) == set(theirs.tensors)
        for name, info in ours.tensors.items():
            other = theirs.tensors[name]
            assert (info.format.name, info.shape) == (other.format.name, other.shape), (scheme.name, name)
            assert blocks(ours, name) == blocks(theirs, name), (scheme.name, name)
        keys = [k for k in ours.metadata if k.startswith(("tokenizer.", f"{ours.get('general.architecture')}."))]
        assert keys
        for key in [*keys, "general.file_type", "general.quantization_version"]:
            assert plain(ours.metadata[key]) == plain(theirs.metadata[key])

"""Which tensor gets which format: equal to llama.cpp's quantizer for every scheme, model and depth.

The oracle is `llama_model_quantize` as a dry run over sparse files, so the true shapes cost nothing.
Axes: schemes x published models (four architectures) x tied and untied heads x with and without an importance matrix,
whose mere presence changes some choices.  Not compared here: bytes; see
`test_gguf_bytes.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smolexport.conversion import portable
from smolexport.errors import UsageError
from smolexport.model.arch import load_spec
from smolexport.model.spec import ModelSpec
from smolexport.quant import FORMATS
from smolexport_to_gguf import architectures
from smolexport_to_gguf.container import header_bytes, padding
from smolexport_to_gguf.metadata import model_metadata, rope_factors
from smolexport_to_gguf.schemes import ALIASES, SCHEMES, find_scheme
from tests.converters.llama_quantize import oracle
from tests.core.published_configs import PUBLISHED, SMOLLM2, sized

MODELS = dict(PUBLISHED)
MODELS["SmolLM2-1.7B untied"] = PUBLISHED["SmolLM2-1.7B"] | {"tie_word_embeddings": False}
MODELS["SmolLM2-135M untied"] = PUBLISHED["SmolLM2-135M"] | {"tie_word_embeddings": False}
MODELS["odd rows"] = sized(SMOLLM2, 96, 172, 5, 6, num_key_value_heads=3, vocab_size=512)
MODELS["Llama-70B"] = sized(SMOLLM2, 8192, 28672, 80, 64, num_key_value_heads=8, tie_word_embeddings=False)
OWN = (*portable.SCHEMES, portable.AUTO_BITS)
QUANTIZED = [s for s in SCHEMES.values() if s.quantized and s.name not in OWN]  # those are our own


def write_sparse(spec: ModelSpec, path: Path) -> None:
    """An f32 GGUF of the right shape whose weights are a hole in the file."""
    rows = [(architectures.output_name(t), t.shape, FORMATS["f32"]) for t in spec.tensors()]
    factors = rope_factors(spec)
    if factors:
        rows.append(("rope_freqs.weight", (len(factors),), FORMATS["f32"]))
    header = header_bytes(model_metadata(spec, SCHEMES["f32"], "sparse"), rows)
    size = len(header) + sum(f.size(s) + padding(f.size(s)) for _, s, f in rows)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)


@pytest.mark.parametrize("name", MODELS)
def test_every_scheme_chooses_what_llama_cpp_chooses(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    spec = load_spec(MODELS[name])
    write_sparse(spec, tmp_path / "model.gguf")
    for weighed in (False, True):
        importance = {"some.weight": np.ones(1, np.float32)} if weighed else None
        theirs = oracle(tmp_path / "model.gguf", None, [s.file_type for s in QUANTIZED], importance)
        for scheme in QUANTIZED:
            chosen = replace(scheme, weighed=weighed)
            ours = {architectures.output_name(t): chosen.choose(t, spec).format.name for t in spec.tensors()}
            if rope_factors(spec):
                ours["rope_freqs.weight"] = "f32"
            assert ours == {k: v.lower() for k, v in theirs[scheme.file_type].items()}, (scheme.name, weighed)


def test_the_requested_format_is_named_only_if_the_shape_does_not_allow_it() -> None:
    spec = load_spec(PUBLISHED["SmolLM2-135M"])
    for tensor in spec.tensors():
        for scheme in QUANTIZED:
            entry = scheme.choose(tensor, spec).entry(tensor.name, tensor)
            form, requested = entry.format, entry.requested
            assert form.fits(tensor.shape[-1])
            assert requested is None or (not requested.fits(tensor.shape[-1]) and requested is not form)
            if scheme.base in ("q8_0", "q4_1", "q5_1") and tensor.shape[-1] % 256 == 0:
                assert requested is None


def test_names_are_llama_cpps_in_any_case() -> None:
    assert find_scheme("Q4_K").name == find_scheme("q4-k-m").name == "q4_k_m"
    assert set(ALIASES.values()) <= set(SCHEMES)
    with pytest.raises(UsageError, match=r"did you mean 'q4_k(_m)?'"):
        find_scheme("q4_kk")
    with pytest.raises(UsageError, match="known: f32"):
        find_scheme("banana")

"""smolexport: small language models to quantized GGUF, MLX and ONNX, each file held against the bf16 original.

    import smolexport

    done = smolexport.export("gguf", "HuggingFaceTB/SmolLM2-135M-Instruct", quant="q8_0")
    print(smolexport.inspect(done.path).bits_per_weight)

Names are imported when they are used, so that `import smolexport` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolexport.arch import load_spec
    from smolexport.convert import Export, export, export_all
    from smolexport.description import Description
    from smolexport.errors import SmolexportError
    from smolexport.face import compare, fingerprint, generate, inspect, read_back
    from smolexport.generation import Generation, Sampling
    from smolexport.parity.inputs import Settings
    from smolexport.parity.results import Comparison, Thresholds
    from smolexport.spec import ModelSpec

__all__ = [
    "Comparison",
    "Description",
    "Export",
    "Generation",
    "ModelSpec",
    "Sampling",
    "Settings",
    "SmolexportError",
    "Thresholds",
    "compare",
    "export",
    "export_all",
    "fingerprint",
    "generate",
    "inspect",
    "load_spec",
    "read_back",
]

_HOMES = {
    "Comparison": "smolexport.parity.results",
    "Description": "smolexport.description",
    "Export": "smolexport.convert",
    "Generation": "smolexport.generation",
    "ModelSpec": "smolexport.spec",
    "Sampling": "smolexport.generation",
    "Settings": "smolexport.parity.inputs",
    "SmolexportError": "smolexport.errors",
    "Thresholds": "smolexport.parity.results",
    "compare": "smolexport.face",
    "export": "smolexport.convert",
    "export_all": "smolexport.convert",
    "fingerprint": "smolexport.face",
    "generate": "smolexport.face",
    "inspect": "smolexport.face",
    "load_spec": "smolexport.arch",
    "read_back": "smolexport.face",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smolexport' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

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
    from smolexport.api import compare, fingerprint, generate, inspect, read_back
    from smolexport.conversion.inspect import FileInfo
    from smolexport.conversion.pipeline import Export, export, export_all
    from smolexport.errors import SmolexportError
    from smolexport.model.arch import load_spec
    from smolexport.model.spec import ModelSpec
    from smolexport.parity.inputs import Settings
    from smolexport.parity.results import Comparison
    from smolexport.parity.thresholds import Thresholds
    from smolexport.run.generate import Generation
    from smolexport.run.sampling import Sampling

__all__ = [
    "Comparison",
    "Export",
    "FileInfo",
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
    "FileInfo": "smolexport.conversion.inspect",
    "Export": "smolexport.conversion.pipeline",
    "Generation": "smolexport.run.generate",
    "ModelSpec": "smolexport.model.spec",
    "Sampling": "smolexport.run.sampling",
    "Settings": "smolexport.parity.inputs",
    "SmolexportError": "smolexport.errors",
    "Thresholds": "smolexport.parity.thresholds",
    "compare": "smolexport.api",
    "export": "smolexport.conversion.pipeline",
    "export_all": "smolexport.conversion.pipeline",
    "fingerprint": "smolexport.api",
    "generate": "smolexport.api",
    "inspect": "smolexport.api",
    "load_spec": "smolexport.model.arch",
    "read_back": "smolexport.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smolexport' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""smolexport: small language models as quantized GGUF, MLX and ONNX files, each compared with the bf16 original.

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
    "api": ("compare", "fingerprint", "generate", "inspect", "read_back"),
    "conversion.inspect": ("FileInfo",),
    "conversion.pipeline": ("Export", "export", "export_all"),
    "errors": ("SmolexportError",),
    "model.arch": ("load_spec",),
    "model.spec": ("ModelSpec",),
    "parity.inputs": ("Settings",),
    "parity.results": ("Comparison",),
    "parity.thresholds": ("Thresholds",),
    "run.generate": ("Generation",),
    "run.sampling": ("Sampling",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"smolexport.{home}"), name)
    raise AttributeError(f"module 'smolexport' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)

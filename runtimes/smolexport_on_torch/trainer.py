"""The trainer, see `smolexport.calibration.trainer.Trainer`.

Importing it raises MissingDependencyError where torch or transformers is not installed.
"""

from __future__ import annotations

from smolexport_on_torch import NAME, importing_libraries, version

with importing_libraries():
    from smolexport_on_torch._collect import TorchEngine as engine  # noqa: N813
    from smolexport_on_torch._distil import distil, divergence
    from smolexport_on_torch._sensitivity import sensitivity

__all__ = ["NAME", "distil", "divergence", "engine", "sensitivity", "version"]

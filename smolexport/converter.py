"""What a converter offers: the one interface that the driver and the command line know.

A protocol, not a base class: a converter is a module named `smolexport_to_*`, found by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smolexport.checkpoint import Checkpoint
from smolexport.description import Description
from smolexport.plan import Plan
from smolexport.spec import ModelSpec, Tensor
from smolexport.tokenizer import TokenizerSpec

__all__ = ["Converter", "SchemeInfo"]


class SchemeInfo(Protocol):
    """A quantization scheme as people see it."""

    @property
    def name(self) -> str:
        """Its name in `--quant`."""
        ...

    @property
    def about(self) -> str:
        """One line about it."""
        ...


class Converter(Protocol):
    """A module `smolexport_to_*`.  See `smolexport_to_gguf` for each function's documentation."""

    @property
    def FORMAT(self) -> str:  # noqa: N802
        """Name of the format, e.g. `gguf`."""
        ...

    @property
    def SUFFIX(self) -> str:  # noqa: N802
        """Ending of the output's name, empty for a folder."""
        ...

    @property
    def DEFAULT(self) -> str:  # noqa: N802
        """The scheme that is taken without `--quant`."""
        ...

    @property
    def SCHEMES(self) -> Mapping[str, Any]:  # noqa: N802
        """Scheme names, each with a `SchemeInfo`."""
        ...

    def find_scheme(self, name: str) -> SchemeInfo:
        """The scheme of that name or alias; raises UsageError."""
        ...

    def check(self, spec: ModelSpec) -> list[str]:
        """Reasons why the format cannot hold `spec`; empty when it can."""
        ...

    def plan(self, spec: ModelSpec, tokenizer: TokenizerSpec, scheme: str, *, name: str) -> Plan:
        """Decide every tensor and key."""
        ...

    def write(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        path: Path,
        *,
        threads: int | None = None,
        force: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[Path]:
        """Stream the plan into `path`, whole or not at all; returns the files written."""
        ...

    def read_back(self, path: Path, spec: ModelSpec) -> Iterator[tuple[Tensor, NDArray[np.float32]]]:
        """Decode every tensor again, in the checkpoint's own order of rows."""
        ...

    def recognises(self, path: Path) -> bool:
        """Whether `path` looks like this format."""
        ...

    def describe(self, path: Path) -> Description:
        """What an exported file is."""
        ...

"""What a converter offers: the one interface that the driver and the command line know.

A protocol, not a base class: a converter is a module named `smolexport_to_*`, found by its name.  It decides and it
knows its container; reading, encoding and the order of work are the driver's, so that several outputs can share one
pass over the checkpoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from smolexport.conversion.file_info import FileInfo
from smolexport.conversion.plan import Plan
from smolexport.conversion.writer import Sink
from smolexport.errors import UsageError
from smolexport.model.spec import ModelSpec, Tensor
from smolexport.model.weights import Weights


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
        """Ending of the output's default name, e.g. `.gguf`."""
        ...

    @property
    def FOLDER(self) -> bool:  # noqa: N802
        """Whether the output is a folder."""
        ...

    @property
    def DEFAULT(self) -> str:  # noqa: N802
        """The scheme that is taken without `--quant`."""
        ...

    @property
    def SCHEMES(self) -> Mapping[str, Any]:  # noqa: N802
        """Scheme names, each with a `SchemeInfo`."""
        ...

    @property
    def OPTIONS(self) -> Mapping[str, str]:  # noqa: N802
        """Keyword arguments of `plan` that people may set with `--set`, each with a line about it."""
        ...

    @property
    def plan(self) -> Callable[..., Plan]:
        """`plan(model: Model, scheme: str, **options)`: decide every tensor and key."""
        ...

    def find_scheme(self, name: str) -> SchemeInfo:
        """The scheme of that name or alias; raises UsageError."""
        ...

    def check(self, spec: ModelSpec) -> list[str]:
        """Reasons why the format cannot hold `spec`; empty when it can."""
        ...

    def bit_choices(self, tensor: Tensor) -> tuple[int, ...]:
        """Bits that the scheme `auto-bits` can give `tensor`, most first; empty for what it does not choose for."""
        ...

    def size(self, plan: Plan) -> int:
        """Bytes of all that `plan` writes, headers and small files included."""
        ...

    def output(self, plan: Plan, path: Path, *, force: bool = False) -> AbstractContextManager[Sink]:
        """Open `path` for the planned tensors; when the block ends it is there, whole, or not at all."""
        ...

    def weights(self, path: Path) -> Weights:
        """The tensors of an exported file, decoded as they are read."""
        ...

    def lint(self, path: Path) -> list[str]:
        """What some reader of the format would refuse or misread in `path`; empty when it is fine.

        Raises:
            FileFormatError: a file is missing or too damaged to be read.
        """
        ...

    def recognises(self, path: Path) -> bool:
        """Whether `path` looks like this format."""
        ...

    def replaceable(self, path: Path) -> bool:
        """For a folder: whether it is an earlier output and holds nothing else, so that `--force` may replace it."""
        ...

    def describe(self, path: Path) -> FileInfo:
        """What an exported file is."""
        ...


S = TypeVar("S")


def named_scheme(name: str, schemes: Mapping[str, S], aliases: Mapping[str, str], target: str) -> S:
    """The scheme that `name` or an alias stands for, in any case, with - and _ alike.

    Args:
        name: what was asked for.
        schemes: by name.
        aliases: other names of theirs.
        target: the format's name, for the message.

    Raises:
        UsageError: unknown; names the known ones.
    """
    key = name.lower().replace("-", "_")
    key = aliases.get(key) or next((scheme for scheme in schemes if scheme.replace("-", "_") == key), key)
    if key not in schemes:
        near = difflib.get_close_matches(key, [*schemes, *aliases], 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        known = ", ".join([*schemes, *aliases])
        raise UsageError(f"--quant {name}: {target} has no such scheme; {hint}known: {known}")
    return schemes[key]

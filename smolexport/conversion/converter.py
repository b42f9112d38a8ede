"""What a converter offers: the one interface that the driver and the command line know.

A protocol, not a base class: a converter is a module named `smolexport_to_*`, found by its name.  It decides on the
tensors and files and knows its container; reading, encoding and writing are the driver's, so that several outputs can
share one pass over the checkpoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from smolexport.conversion.inspect import FileInfo
from smolexport.conversion.plan import Entry, Plan
from smolexport.errors import UsageError
from smolexport.model.spec import ModelSpec, Tensor, departures
from smolexport.model.weights import Weights
from smolexport.quant import RowFormat


@dataclass(frozen=True)
class Choice:
    """What a scheme does with one tensor; `requested` and `rounded_through` as in `Entry`."""

    format: RowFormat
    requested: RowFormat | None = None
    rounded_through: RowFormat | None = None

    def entry(self, name: str, tensor: Tensor, **more: Any) -> Entry:
        """The entry `name` of a plan; `more` are its other attributes."""
        requested = None if self.requested == self.format else self.requested
        return Entry(name, self.format, tensor.shape, tensor, requested, rounded_through=self.rounded_through, **more)


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
    """A module `smolexport_to_*`.

    Attributes:
        FORMAT: name of the format, e.g. `gguf`.
        SUFFIX: ending of the output's default name, e.g. `.gguf`.
        FOLDER: whether the output is a folder.
        DEFAULT: the scheme without `--quant`.
        SCHEMES: scheme names, each with a `SchemeInfo`.
        OPTIONS: keyword arguments of `plan` that users may set with `--set`, each with a line about it.
        plan: `plan(model: SourceModel, scheme: str, **options)` decides every tensor, key and file.
    """

    FORMAT: str
    SUFFIX: str
    FOLDER: bool
    DEFAULT: str
    SCHEMES: Mapping[str, Any]
    OPTIONS: Mapping[str, str]

    @property
    def plan(self) -> Callable[..., Plan]: ...  # noqa: D102

    def find_scheme(self, name: str) -> SchemeInfo:
        """The scheme of that name or alias; raises UsageError."""
        ...

    def check(self, spec: ModelSpec) -> list[str]:
        """Reasons why the format cannot hold `spec`; empty if it can."""
        ...

    def bit_choices(self, tensor: Tensor) -> tuple[int, ...]:
        """Bits that the scheme `auto-bits` can give `tensor`, most first; empty if it does not choose for it."""
        ...

    def weights(self, path: Path) -> Weights:
        """The tensors of an exported file, decoded as they are read."""
        ...

    def lint(self, path: Path) -> list[str]:
        """What some reader of the format would refuse or misread in `path`; raises FileFormatError."""
        ...

    def recognises(self, path: Path) -> bool:
        """Whether `path` has this format."""
        ...

    def replaceable(self, path: Path) -> bool:
        """For a folder: whether it is an earlier output and holds nothing else, so that `--force` may replace it."""
        ...

    def describe(self, path: Path) -> FileInfo:
        """What an exported file contains, from its headers."""
        ...


def refusals(
    target: str, spec: ModelSpec, computed: Mapping[str, tuple[object, ...]], more: Iterable[str]
) -> list[str]:
    """Reasons why `target` cannot compute `spec`: `departures` from `computed`; if there are none, those in `more`."""
    return [f"{target} {reason}" for reason in list(departures(spec, computed)) or more]


def several_ropes(spec: ModelSpec) -> Iterator[str]:
    """The reason of a target that has one rotary embedding for all layers."""
    ropes = list(dict.fromkeys(layer.mixer.rope for layer in spec.layers if layer.mixer.rope is not None))
    if len(ropes) > 1:
        yield f"has one rotary embedding for all layers, the checkpoint {len(ropes)}: {ropes[0]} and {ropes[1]}"


def other_head_dim(spec: ModelSpec) -> Iterator[str]:
    """The reason of a target that derives head_dim from the other sizes."""
    a = spec.attention
    if a.num_attention_heads * a.head_dim != spec.hidden_size:
        yield (
            f"computes head_dim as hidden_size / num_attention_heads, the checkpoint has a head_dim of {a.head_dim} "
            f"with {spec.hidden_size} / {a.num_attention_heads}"
        )


def has_more_bits(layer: int, layers: int) -> bool:
    """The layers that mixes give more bits, in llama.cpp and mlx-lm: first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


S = TypeVar("S")


def named_scheme(name: str, schemes: Mapping[str, S], aliases: Mapping[str, str], target: str) -> S:
    """The scheme of that name or alias, in any case, with - and _ alike; `target` names the format in messages.

    Raises:
        UsageError: unknown; names the known ones.
    """
    known = {other.replace("-", "_"): schemes[aliases.get(other, other)] for other in (*aliases, *schemes)}
    key = name.strip().lower().replace("-", "_")
    if key not in known:
        near = difflib.get_close_matches(name.strip().lower(), [*schemes, *aliases], 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UsageError(f"--quant {name}: {target} has no such scheme; {hint}known: {', '.join([*schemes, *aliases])}")
    return known[key]

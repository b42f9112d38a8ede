"""What a file must reach: thresholds, from flags or from a TOML file that knows formats and schemes.

    [default]            # every file
    max_kld = 0.05
    min_top1 = 0.9

    [int4]               # a scheme, in every format that has it
    max_exporter_kld = 0.001

    [gguf]               # a format
    max_ppl_ratio = 1.03

    [gguf.q4_k_m]        # a scheme of one format
    max_kld = 0.02

Each threshold is taken from the most specific table that names it: `[gguf.q4_k_m]`, then `[q4_k_m]`, then `[gguf]`,
then `[default]`.  A table for nothing that is installed is an error: a typing mistake must not open the gate.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolexport.errors import UsageError
from smolexport.text import label, reason, show

if TYPE_CHECKING:
    from smolexport.parity.inputs import Candidate
    from smolexport.parity.results import Accuracy, Attribution

__all__ = ["Check", "Gate", "Rule", "Thresholds", "gate_from", "read_gate"]

_DEFAULT = "default"


@dataclass(frozen=True)
class Check:
    """One figure held against one threshold.

    Attributes:
        kind: the threshold's name, `finite` for the one that always holds.
        figure: what was measured, NaN where it was not.
        limit: the threshold, None for `finite`.
        miss: a sentence where it was not reached, else empty.
    """

    kind: str
    figure: float
    limit: float | None
    miss: str


@dataclass(frozen=True)
class Thresholds:
    """What a candidate must reach; None is not asked for.

    Attributes:
        max_kld: mean KLD against the reference, nats per token.
        min_top1: share of positions with the same likeliest word.
        max_ppl_ratio: perplexity over the reference's.
        max_exporter_kld: mean KLD of the file on its runtime against its own decoded weights.
        max_pair_kld: mean KLD against each other file that holds the same weights, where there is one.
    """

    max_kld: float | None = None
    min_top1: float | None = None
    max_ppl_ratio: float | None = None
    max_exporter_kld: float | None = None
    max_pair_kld: float | None = None

    def thresholds_for(self, model: Candidate) -> Thresholds:  # noqa: ARG002 - a gate chooses by it
        """What `model` must reach: these, whatever it is."""
        return self

    @property
    def asked(self) -> bool:
        """Whether any threshold is set."""
        return self != Thresholds()

    @property
    def needs_attribution(self) -> bool:
        """Whether a candidate's deviation has to be taken apart to judge it."""
        return self.max_exporter_kld is not None

    def overlaid(self, other: Thresholds) -> Thresholds:
        """These, with those that `other` sets in their place."""
        return Thresholds(**(_set(self) | _set(other)))

    def checks(
        self, accuracy: Accuracy, attribution: Attribution | None = None, pairs: Sequence[Accuracy] = ()
    ) -> tuple[Check, ...]:
        """Each threshold that is asked for with its figure.  Figures that are not finite always miss.

        Args:
            accuracy: the candidate against the reference.
            attribution: its deviation in parts; None misses `max_exporter_kld`, which cannot be judged then.
            pairs: the candidate against others that hold the same weights; none is no miss.
        """
        kld, ratio = accuracy.kld.mean.value, accuracy.ratio.value
        broken = ""
        if not (math.isfinite(kld) and math.isfinite(ratio)):
            broken = f"logits are not all finite (mean KLD {kld}): the file or its runtime is damaged"
        exporter = attribution.exporter.kld.mean.value if attribution else math.nan
        figures: dict[str, tuple[float, str]] = {
            "max_kld": (kld, "mean KLD {:.4g}"),
            "min_top1": (accuracy.top1.value, "top-1 agreement {:.4f}"),
            "max_ppl_ratio": (ratio, "perplexity ratio {:.5f}"),
            "max_exporter_kld": (exporter, "mean KLD {:.4g} due to exporter and runtime"),
        }
        if pairs:
            apart = [pair.kld.mean.value for pair in pairs]
            worst = max(apart) if all(map(math.isfinite, apart)) else math.nan
            figures["max_pair_kld"] = (worst, "mean KLD {:.4g} against another file with the same weights")
        found = [Check("finite", kld, None, broken)]
        for name, limit in _set(self).items():
            if name in figures:
                figure, words = figures[name]
                unknown = name == "max_exporter_kld" and attribution is None
                miss = f"{name} = {limit:g} was not measured" if unknown else _miss(name, figure, limit, words)
                found.append(Check(name, figure, limit, broken or miss))
        return tuple(found)

    def misses(
        self, accuracy: Accuracy, attribution: Attribution | None = None, pairs: Sequence[Accuracy] = ()
    ) -> tuple[str, ...]:
        """One sentence per threshold that is missed; arguments as for `checks`."""
        return tuple(dict.fromkeys(check.miss for check in self.checks(accuracy, attribution, pairs) if check.miss))


@dataclass(frozen=True)
class Rule:
    """Thresholds for some candidates: of `format`, of `scheme`, of both; None is any."""

    format: str | None
    scheme: str | None
    limits: Thresholds


@dataclass(frozen=True)
class Gate(Thresholds):
    """Thresholds with exceptions: its own are the defaults, and `rules` stand from the general to the specific."""

    rules: tuple[Rule, ...] = ()

    def thresholds_for(self, model: Candidate) -> Thresholds:
        """What `model` must reach.  Of several schemes in one folder, `int4+f32`, the first is the one that counts."""
        schemes = (None, model.scheme, model.scheme.partition("+")[0])
        limits = Thresholds(**_set(self))
        for rule in self.rules:
            if rule.format in (None, model.format) and rule.scheme in schemes:
                limits = limits.overlaid(rule.limits)
        return limits

    @property
    def asked(self) -> bool:
        """Whether any threshold is set for anything."""
        return bool(_set(self)) or any(rule.limits.asked for rule in self.rules)

    @property
    def needs_attribution(self) -> bool:
        """Whether any threshold is about the parts of a deviation."""
        return any(limits.max_exporter_kld is not None for limits in (self, *(rule.limits for rule in self.rules)))

    def overridden(self, flags: Thresholds) -> Gate:
        """This gate with what `flags` set in place of the defaults and of every rule's."""
        rules = tuple(dataclasses.replace(rule, limits=rule.limits.overlaid(flags)) for rule in self.rules)
        return Gate(**(_set(self) | _set(flags)), rules=rules)


_NAMES = tuple(field.name for field in dataclasses.fields(Thresholds))


def _set(limits: Thresholds) -> dict[str, float]:
    """The thresholds that are asked for, by name."""
    return {name: value for name in _NAMES if (value := getattr(limits, name)) is not None}


def _miss(name: str, figure: float, limit: float, words: str) -> str:
    """Empty where `figure` reaches `limit`; NaN reaches nothing."""
    least = name.startswith("min_")
    reaches: Callable[[float, float], bool] = operator.ge if least else operator.le
    if reaches(figure, limit):
        return ""
    return f"{words.format(figure)} is {'below' if least else 'above'} {limit:g}"


def gate_from(path: Path | None, flags: Thresholds) -> Thresholds:
    """What `path` asks for, with `flags` on top; the flags alone where it is None.

    Raises:
        UsageError: see `read_gate`.
    """
    return flags if path is None else read_gate(path).overridden(flags)


def read_gate(path: Path) -> Gate:
    """The gate in the TOML file `path`.

    Raises:
        UsageError: no such file, no TOML, a table for no format or scheme that is installed, a key that is no
            threshold, a value that is no number or out of its range; names file, table and key.
    """
    import tomllib

    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of a number of thousands of digits
        raise UsageError(f"{path}: is not TOML: {reason(error)}") from error
    rules: list[tuple[int, Rule]] = []
    default = Thresholds()
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(
                f"{path}: {label(name)}: stands in no table; thresholds for every file belong under [{_DEFAULT}]"
            )
        if name == _DEFAULT:
            default = _limits(path, name, table)
        else:
            rules += _rules(path, name, table)
    seen: set[tuple[int, str | None, str | None]] = set()
    for rank, rule in rules:
        if (rank, rule.format, rule.scheme) in seen:
            raise UsageError(f"{path}: {rule.format} {rule.scheme} has two tables, under two names of one scheme")
        seen.add((rank, rule.format, rule.scheme))
    rules.sort(key=lambda ranked: ranked[0])
    gate = Gate(**_set(default), rules=tuple(rule for _, rule in rules))
    if not gate.asked:
        raise UsageError(f"{path}: sets no threshold; there are {', '.join(_NAMES)}")
    return gate


def _rules(path: Path, name: str, table: Mapping[str, Any]) -> list[tuple[int, Rule]]:
    """The rules of one top-level table, each with how specific it is."""
    formats, lower = _formats(), name.lower()
    if lower in formats:
        inner = {key: value for key, value in table.items() if isinstance(value, dict)}
        found = [(1, Rule(lower, None, _limits(path, name, {k: v for k, v in table.items() if k not in inner})))]
        for key, values in inner.items():
            scheme = formats[lower](key)
            if scheme is None:
                raise UsageError(f"{path}: [{label(f'{name}.{key}')}]: the format {lower} has no scheme of that name")
            found.append((3, Rule(lower, scheme, _limits(path, f"{name}.{key}", values))))
        return found
    limits = _limits(path, name, table)
    known = {each: scheme for each, find in formats.items() if (scheme := find(name)) is not None}
    # another name of one format's scheme may be the very name of another's
    own = {each: scheme for each, scheme in known.items() if scheme == lower.replace("-", "_")}
    found = [(2, Rule(each, scheme, limits)) for each, scheme in (own or known).items()]
    if not found:
        there = f"{_DEFAULT}, the formats {', '.join(formats)}, and their schemes, see `smolexport list`"
        raise UsageError(f"{path}: [{label(name)}]: is no table of a gate; there are {there}")
    return found


def _formats() -> dict[str, Callable[[str], str | None]]:
    """Installed formats by name, each with a function from a scheme's name or alias to its name, None if unknown."""
    from smolexport import plugins

    def finder(converter: Any) -> Callable[[str], str | None]:
        def find(name: str) -> str | None:
            try:
                return str(converter.find_scheme(name).name)
            except UsageError:
                return None

        return find

    return {module.FORMAT: finder(module) for module in map(plugins.converter, plugins.converters())}


def _limits(path: Path, table: str, values: Mapping[str, Any]) -> Thresholds:
    """One table's thresholds, checked."""
    for key, value in values.items():
        where = f"{path}: [{label(table)}] {label(key)}"
        if key not in _NAMES:
            near = difflib.get_close_matches(key, _NAMES, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"{where}: is no threshold; {hint}there are {', '.join(_NAMES)}")
        if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
            raise UsageError(f"{where} = {_shown(value)}: should be a number, at least 0")
        if key == "min_top1" and value > 1:
            raise UsageError(f"{where} = {value}: should be a share, at most 1")
    return Thresholds(**values)


def _shown(value: object) -> str:
    """A value as TOML has it, on one short line."""
    return str(value).lower() if isinstance(value, bool) else show(value, 40)

"""Thresholds that a file must meet, from flags or from a TOML file with tables per format and scheme.

    [default]            # every file
    max_kld = 0.05
    min_top1 = 0.9

    [int4]               # a scheme, in every format that has it
    max_exporter_kld = 0.001

    [gguf]               # a format
    max_ppl_ratio = 1.03

    [gguf.q4_k_m]        # a scheme of one format
    max_kld = 0.02

Each threshold comes from the most specific table that sets it: `[gguf.q4_k_m]`, then `[q4_k_m]`, then `[gguf]`, then
`[default]`.  A table for a format or scheme that is not installed is an error: a typo must not disable a threshold.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from smolexport import plugins
from smolexport.errors import UsageError
from smolexport.text import label, reason, show

if TYPE_CHECKING:
    from smolexport.parity.results import Accuracy, Attribution, ModelInfo

_DEFAULT = "default"


class Check(NamedTuple):
    """One figure checked against one threshold, or (of kind `finite`, without a limit) for being a number."""

    kind: str
    figure: float  # NaN if not measured
    limit: float | None
    miss: str  # a sentence if the threshold was missed, else empty


@dataclass(frozen=True)
class Thresholds:
    """Thresholds that a candidate must meet; null is not set.

    Those of `rules`, which go from general to specific, replace them for the models that they match.
    """

    max_kld: Annotated[float | None, "mean KLD against the reference, nats per token."] = None
    min_top1: Annotated[float | None, "share of positions with the same most likely token."] = None
    max_ppl_ratio: Annotated[float | None, "perplexity over the reference's perplexity."] = None
    max_exporter_kld: Annotated[
        float | None, "mean KLD of the file on its runtime against its own decoded weights."
    ] = None
    max_pair_kld: Annotated[float | None, "mean KLD against every other file with the same weights."] = None

    rules: tuple[Rule, ...] = field(default=(), metadata={"hidden": True})

    def thresholds_for(self, model: ModelInfo) -> Thresholds:
        """Thresholds for `model`.  For a folder with several schemes, `int4+f32`, the first one counts."""
        schemes = (None, model.scheme, model.scheme.partition("+")[0])
        limits = replace(self, rules=())
        for rule in self.rules:
            if rule.format in (None, model.format) and rule.scheme in schemes:
                limits = limits.overridden(rule.limits)
        return limits

    def needs_attribution(self) -> bool:
        """Whether checking any candidate needs the deviation split into its two parts."""
        return any(limits.max_exporter_kld is not None for limits in (self, *(rule.limits for rule in self.rules)))

    def values(self) -> dict[str, float]:
        """The thresholds that are set for every model, by name."""
        return {name: value for name in _NAMES if (value := getattr(self, name)) is not None}

    def overridden(self, other: Thresholds) -> Thresholds:
        """These thresholds; those that `other` sets for every model replace them, also in every rule."""
        rules = tuple(rule._replace(limits=rule.limits.overridden(other)) for rule in self.rules)
        limits: dict[str, Any] = self.values() | other.values()
        return Thresholds(**limits, rules=rules)

    def checks(
        self, accuracy: Accuracy, attribution: Attribution | None = None, pairs: Sequence[Accuracy] = ()
    ) -> tuple[Check, ...]:
        """Check each threshold that is set.  Figures that are not finite always miss.

        Without `attribution`, `max_exporter_kld` is missed; without `pairs`, the candidate against others with the same
        weights, `max_pair_kld` is not checked.
        """
        kld, ratio = accuracy.kld.mean.value, accuracy.perplexity_ratio.value
        broken = ""
        if not (math.isfinite(kld) and math.isfinite(ratio)):
            broken = f"logits are not all finite (mean KLD {kld}): the file is damaged or its runtime is faulty"
        exporter = attribution.exporter.kld.mean.value if attribution else math.nan
        figures: dict[str, tuple[float, str]] = {
            "max_kld": (kld, "mean KLD {:.4g}"),
            "min_top1": (accuracy.top1_agreement.value, "top-1 agreement {:.4f}"),
            "max_ppl_ratio": (ratio, "perplexity ratio {:.5f}"),
            "max_exporter_kld": (exporter, "mean KLD {:.4g} due to exporter and runtime"),
        }
        if pairs:
            values = [pair.kld.mean.value for pair in pairs]
            worst = max(values) if all(map(math.isfinite, values)) else math.nan
            figures["max_pair_kld"] = (worst, "mean KLD {:.4g} against another file with the same weights")
        found = [Check("finite", kld, None, broken)]
        for name, limit in self.values().items():
            if name in figures:
                (figure, words), least = figures[name], name.startswith("min_")
                met = figure >= limit if least else figure <= limit  # NaN meets no limit
                miss = "" if met else f"{words.format(figure)} is {'below' if least else 'above'} {limit:g}"
                if name == "max_exporter_kld" and attribution is None:
                    miss = f"{name} = {limit:g} was not measured"
                found.append(Check(name, figure, limit, broken or miss))
        return tuple(found)

    def misses(
        self, accuracy: Accuracy, attribution: Attribution | None = None, pairs: Sequence[Accuracy] = ()
    ) -> tuple[str, ...]:
        """One sentence per missed threshold; arguments as for `checks`."""
        return tuple(dict.fromkeys(check.miss for check in self.checks(accuracy, attribution, pairs) if check.miss))


class Rule(NamedTuple):
    """Thresholds for the candidates of `format` and `scheme`; None matches any."""

    format: str | None
    scheme: str | None
    limits: Thresholds


_NAMES = tuple(one.name for one in fields(Thresholds) if one.name != "rules")


def gate_from(path: Path | None, flags: Thresholds) -> Thresholds:
    """The thresholds in `path`, see `read_gate`, with `flags` overriding them; the flags alone if `path` is None."""
    return flags if path is None else read_gate(path).overridden(flags)


def read_gate(path: Path) -> Thresholds:
    """The thresholds in the TOML file `path`.

    Raises:
        UsageError: the file does not exist or is not TOML, a table names no installed format or scheme, a key is not
            a threshold, a value is not a number or out of range; the message names file, table and key.
    """
    import tomllib

    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of a number of thousands of digits
        raise UsageError(f"{path}: is not TOML: {reason(error)}") from error
    found: dict[_Key, Thresholds] = {}
    default = Thresholds()
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(
                f"{path}: {label(name)}: is outside of any table; thresholds for every file belong under [{_DEFAULT}]"
            )
        if name == _DEFAULT:
            default = _limits(path, name, table)
            continue
        for key, limits in _rules(path, name, table):
            if key in found:
                raise UsageError(f"{path}: {key[1]} {key[2]} has two tables, under two names of the scheme")
            found[key] = limits
    ordered = sorted(found.items(), key=lambda one: one[0][0])
    gate = Thresholds(**default.values(), rules=tuple(Rule(*key[1:], limits) for key, limits in ordered))
    if not any(limits.values() for limits in (gate, *found.values())):
        raise UsageError(f"{path}: sets no threshold; available: {', '.join(_NAMES)}")
    return gate


_Key = tuple[int, str, str | None]
"""Rank of a rule from general to specific, format, scheme."""


def _rules(path: Path, name: str, table: Mapping[str, Any]) -> list[tuple[_Key, Thresholds]]:
    """The rules of one top-level table."""
    formats, lower = {module.FORMAT: module for module in map(plugins.converter, plugins.converters())}, name.lower()
    if lower in formats:
        inner = {key: value for key, value in table.items() if isinstance(value, dict)}
        own = _limits(path, name, {key: value for key, value in table.items() if key not in inner})
        found: list[tuple[_Key, Thresholds]] = [((1, lower, None), own)]
        for key, values in inner.items():
            scheme = _scheme(formats[lower], key)
            if scheme is None:
                raise UsageError(f"{path}: [{label(f'{name}.{key}')}]: format {lower} has no such scheme")
            found.append(((3, lower, scheme), _limits(path, f"{name}.{key}", values)))
        return found
    limits = _limits(path, name, table)
    known = {each: scheme for each, module in formats.items() if (scheme := _scheme(module, name)) is not None}
    if not known:
        known_tables = f"{_DEFAULT}, the formats {', '.join(formats)}, and their schemes (see `smolexport list`)"
        raise UsageError(f"{path}: [{label(name)}]: unknown table; use {known_tables}")
    # an alias of one format's scheme may be the name of another's
    exact = {each: scheme for each, scheme in known.items() if scheme == lower.replace("-", "_")}
    return [((2, each, scheme), limits) for each, scheme in (exact or known).items()]


def _scheme(converter: Any, name: str) -> str | None:
    """The converter's name of the scheme with this name or alias; None if it has none."""
    try:
        return str(converter.find_scheme(name).name)
    except UsageError:
        return None


def _limits(path: Path, table: str, values: Mapping[str, Any]) -> Thresholds:
    """One table's thresholds, checked."""
    for key, value in values.items():
        where = f"{path}: [{label(table)}] {label(key)}"
        if key not in _NAMES:
            near = difflib.get_close_matches(key, _NAMES, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise UsageError(f"{where}: is not a threshold{hint}; available: {', '.join(_NAMES)}")
        if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
            shown = str(value).lower() if isinstance(value, bool) else show(value, 40)  # as TOML writes it
            raise UsageError(f"{where} = {shown}: must be a number, at least 0")
        if key == "min_top1" and value > 1:
            raise UsageError(f"{where} = {value}: must be a share, at most 1")
    return Thresholds(**values)

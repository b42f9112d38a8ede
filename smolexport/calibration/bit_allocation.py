"""Bits chosen matrix by matrix under a budget: cost and size of each option, the choice, and its measured divergence.

Rounding a matrix changes its outputs by D x, D the rounding errors.  With H the mean of x x^T, and F_r the sensitivity
of the predictions to output r, that costs a divergence of about 1/2 sum over r of F_r (D H D^T)_rr.  Row t of an
embedding is looked up as often as its token occurs: 1/2 sum over t of f_t sum over j of F_j D_tj^2.

These costs add up only while they are small, and ignore how errors of several matrices interact.  So the divergence
that is reported, and that `--target-kld` limits, is measured: with the weights as a reader of the files sees them, on
windows of the statistics that are held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from smolexport.calibration import knapsack
from smolexport.calibration.knapsack import Allocation, Budget, Choice, Option, Unit
from smolexport.calibration.statistics import Input, Statistics, input_of
from smolexport.calibration.student import Student
from smolexport.calibration.trainer import Trainer, held_out
from smolexport.conversion.converter import Converter
from smolexport.conversion.plan import Entry, Plan
from smolexport.conversion.source_model import SourceModel
from smolexport.errors import CalibrationError, UsageError
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.spec import ModelSpec, Role, Tensor
from smolexport.plugins import trainer
from smolexport.processes import thread_count

SAMPLE = 256  # rows of a matrix that are rounded
HEAD = "lm_head.weight"  # under this name also where the head is tied
SENSITIVITY_WINDOWS = 16
ROUNDS = 4
NEAR = 0.9  # share of the target that is near enough
FUSED: Mapping[Role, str] = {
    Role.Q: "qkv", Role.K: "qkv", Role.V: "qkv", Role.GATE: "gate_up", Role.UP: "gate_up",
}  # fmt: skip

Floats = NDArray[np.float64]


def _groups(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that must get the same bits."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.layer, FUSED.get(tensor.role, tensor.role), tensor.part), []).append(tensor)
    return list(groups.values())


def bit_choices_of(modules: Sequence[Converter], spec: ModelSpec) -> dict[Tensor, tuple[int, ...]]:
    """Bits, largest first, that all `modules` support for each matrix and for those that must get the same."""
    found: dict[Tensor, tuple[int, ...]] = {}
    for group in _groups(spec.tensors()):
        common = set.intersection(*(set(module.bit_choices(tensor)) for module in modules for tensor in group))
        found |= {tensor: tuple(sorted(common, reverse=True)) for tensor in group if common}
    return found


@dataclass
class BitAllocator:
    """Chooses bits for all formats of one export.

    Attributes:
        modules: the formats' converters.
        model: the exported model.
        source: its weights, as the method prepared them.
        statistics: of the checkpoint.
        budget: what the export may cost.
        planned: (converter, model with bits) -> its plan, with the method's encoders.
        record: what a file's metadata will say of an allocation.
    """

    modules: Sequence[Converter]
    model: SourceModel
    source: Checkpoint
    statistics: Statistics
    budget: Budget
    planned: Callable[[Converter, SourceModel], Plan]
    record: Callable[[Allocation], str]
    units: list[Unit] = field(default_factory=list, init=False)

    def decide(self) -> Allocation:
        """The bits of every matrix.

        Raises:
            UsageError: the budget cannot be met; names the least that can.
            CalibrationError: a statistic is missing or damaged.
            MissingDependencyError: no trainer is installed.
        """
        self._trainer: Trainer = trainer()
        self._choices = bit_choices_of(self.modules, self.model.spec)
        if not self._choices:
            raise UsageError(f"{self.model.name}: no matrix has rows that are a multiple of 32; no bits can be chosen")
        self._say("measuring the cost of each matrix ...")
        self.units = self._measured_units()
        if self.budget.size is not None:
            choice = self._within(self.budget.size)
            return self._allocation(choice, self._measured(choice) if self.budget.measure else None)
        return self._reached(self.budget.target_kld or 0.0)

    def _say(self, line: str) -> None:
        if self.budget.say:
            self.budget.say(line)

    def _plans(self, bits: Mapping[Tensor, int]) -> list[Plan]:
        model = replace(self.model, bits=bits)
        return [self.planned(module, model) for module in self.modules]

    def _measured_units(self) -> list[Unit]:
        windows = self.statistics.windows()
        some = windows[: max(1, min(SENSITIVITY_WINDOWS, len(windows) - held_out(len(windows))))]
        costs = Costs(self.source, self.statistics, self._trainer.sensitivity(self.source.folder, some))
        entries = {}  # by the least bits of all matrices, for each plan
        for least in sorted({bits for choices in self._choices.values() for bits in choices}):
            bits = {t: min((b for b in found if b >= least), default=found[0]) for t, found in self._choices.items()}
            plans = self._plans(bits)
            entries[least] = [{e.tensor: e for e in plan.entries if e.tensor is not None} for plan in plans]
        units = []
        for group in _groups(self._choices):
            options = []
            for choice in self._choices[group[0]]:
                nbytes = max(sum(found[t].nbytes for t in group) for found in entries[choice])
                cost = sum(costs.of(t, [found[t] for found in entries[choice]]) for t in group)
                options.append(Option(choice, nbytes, cost))
            units.append(Unit(tuple(group), tuple(options)))
        return units

    def _allocation(self, choice: Choice, measured: float | None) -> Allocation:
        bits = {t: option.bits for unit, option in zip(self.units, choice, strict=True) for t in unit.tensors}
        windows = held_out(self.statistics.manifest.windows)
        return Allocation(self.budget, bits, knapsack.cost_of(choice), measured, windows)

    def _largest(self, choice: Choice) -> int:
        """Bytes of the largest of the finished outputs, with the longest record in their metadata."""
        longest = replace(self._allocation(choice, 1.123456), predicted=1.123456)
        model = replace(self.model, bits=longest.bits, calibration=self.record(longest))
        return max(self.planned(module, model).size for module in self.modules)

    def _within(self, size: int) -> Choice:
        least = knapsack.least(self.units)
        other = self._largest(least) - knapsack.size_of(least)
        choice = knapsack.spend(self.units, size, other)
        while choice != least and (excess := self._largest(choice) - size) > 0:
            other += excess  # metadata and padding depend on the choice
            fits = size - other >= knapsack.size_of(least)
            choice = knapsack.spend(self.units, size, other) if fits else least
        return choice

    def _reached(self, target: float) -> Allocation:
        if not self.budget.measure:
            return self._allocation(knapsack.reach(self.units, target), None)
        finest = knapsack.finest(self.units)
        factor, tried = 1.0, list[tuple[Choice, float]]()
        for _ in range(ROUNDS):
            possible = knapsack.cost_of(finest) * factor <= target
            choice = knapsack.reach(self.units, target / factor) if possible else finest
            if any(choice == earlier for earlier, _ in tried):
                break
            kld = self._measured(choice)
            tried.append((choice, kld))
            self._say(f"predicted KLD {knapsack.cost_of(choice):.5f}, measured {kld:.5f}")
            if NEAR * target <= kld <= target:
                break
            factor = kld / max(knapsack.cost_of(choice), 1e-12)
            if kld > target:
                factor *= 1.02  # aim a little below the target
        if all(kld > target for _, kld in tried):
            tried.append((finest, self._measured(finest)))
        met = [(knapsack.size_of(choice), kld, choice) for choice, kld in tried if kld <= target]
        if not met:
            lowest = min(kld for _, kld in tried)
            raise UsageError(f"--target-kld {target:g}: {lowest:.2g} is the least that can be had, measured")
        _, kld, choice = min(met, key=lambda found: found[:2])
        return self._allocation(choice, kld)

    def _measured(self, choice: Choice) -> float:
        """Divergence of the finished weights on the held-out windows; of several formats, the largest."""
        self._say("encoding and measuring ...")
        count = self.statistics.manifest.windows
        start = count - held_out(count)
        windows, teacher = self.statistics.windows()[start:], self.statistics.teacher(start)
        outputs: dict[object, Sequence[Entry]] = {}
        for plan in self._plans(self._allocation(choice, None).bits):
            canonical = frozenset((e.tensor, e.canonical) for e in plan.entries if e.is_matrix)
            outputs.setdefault(canonical, plan.entries)
        return max(
            self._trainer.divergence(
                self.source.folder, Student(entries, self.source, thread_count()).decoded(), windows, teacher
            )
            for entries in outputs.values()
        )


class Costs:
    """Costs of the matrices of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, statistics: Statistics, sensitivity: Mapping[str, Floats]) -> None:
        """`sensitivity`: by source name, of `Trainer.sensitivity`."""
        self._checkpoint, self._statistics, self._sensitivity = checkpoint, statistics, sensitivity
        size = checkpoint.spec.vocab_size
        counts = np.bincount(statistics.windows()[:, 1:].ravel(), minlength=size)[:size]
        self._frequencies: Floats = counts / max(1, counts.sum())
        self._last: tuple[Input, NDArray[np.float32]] | None = None  # matrices with one input follow each other

    def of(self, tensor: Tensor, entries: Iterable[Entry]) -> float:
        """Largest cost of `entries`, ways to store `tensor`, in nats per token; raises CalibrationError."""
        products, lookups = self._weights(tensor)
        rows, scale = sample(products + lookups)
        weights = self._checkpoint.stored[tensor].read_rows()[rows]
        forms = {(e.canonical, e.rounded_through, e.encoder is None and e.importance is None): e for e in entries}
        found = 0.0
        for entry in forms.values():
            encoded = entry.encode(weights)
            error = weights.astype(np.float32) - entry.canonical.decode(encoded, tensor.shape[1])
            cost = 0.0
            if products.any():
                squares = np.einsum("ij,ij->i", error @ self._hessian(tensor), error).astype(np.float64)
                cost += float(products[rows] * scale @ np.maximum(squares, 0))
            if lookups.any():
                sensitivity = self._sensitivity_of(tensor.stored_name, tensor.shape[1])
                cost += float(self._frequencies[rows] * scale @ (error.astype(np.float64) ** 2 @ sensitivity))
            found = max(found, cost / 2)
        return found

    def _weights(self, tensor: Tensor) -> tuple[Floats, Floats]:
        """Weight of each row in matrix products, and in lookups, on comparable scales."""
        rows, nothing = tensor.shape[0], np.zeros(tensor.shape[0])
        if tensor.role is not Role.EMBED:
            return self._sensitivity_of(HEAD if tensor.role is Role.HEAD else tensor.stored_name, rows), nothing
        lookups = self._frequencies * float(self._sensitivity_of(tensor.stored_name, tensor.shape[1]).mean())
        if not self._checkpoint.spec.tied:
            return nothing, lookups
        return self._sensitivity_of(HEAD, rows), lookups

    def _sensitivity_of(self, name: str, outputs: int) -> Floats:
        found = self._sensitivity.get(name)
        if found is None or found.shape != (outputs,):
            raise CalibrationError(f"{self._checkpoint.folder}: {name}: the trainer gave no {outputs} sensitivities")
        return found

    def _hessian(self, tensor: Tensor) -> NDArray[np.float32]:
        key = input_of(tensor)
        if self._last is None or self._last[0] != key:
            self._last = None  # freed before the next one is read
            self._last = key, self._statistics.hessian(tensor)
        return self._last[1]


def sample(weights: Floats, count: int = SAMPLE) -> tuple[NDArray[np.int64], Floats]:
    """Indices of at most `count` rows, and how many rows each represents: the heaviest, and some of all others.

    Args:
        weights: of each row.
        count: even.
    """
    rows = len(weights)
    if rows <= count:
        return np.arange(rows), np.ones(rows)
    order = np.argsort(-weights, kind="stable")
    heavy, light = order[: count // 2], np.sort(order[count // 2 :])
    some = light[np.linspace(0, len(light) - 1, count // 2).round().astype(np.int64)]
    scale = np.concatenate([np.ones(len(heavy)), np.full(len(some), len(light) / len(some))])
    chosen = np.concatenate([heavy, some])
    by_number = np.argsort(chosen)
    return chosen[by_number], scale[by_number]

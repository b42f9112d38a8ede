"""Bits chosen matrix by matrix under a budget: what each matrix costs and takes, what is chosen, and what came of it.

Rounding a matrix changes its outputs by D x, D the rounding errors.  With H the mean of x x^T, and F_r how much the
predictions feel output r, that diverges by about 1/2 sum over r of F_r (D H D^T)_rr.  A looked-up row t of an embedding
is read as often as its token comes: 1/2 sum over t of f_t sum over j of F_j D_tj^2.

These costs add up only while they are small, and leave out how errors of several matrices meet.  So the divergence
that is reported, and that `--target-kld` is about, is measured: the weights as a reader of the files sees them, on
windows of the statistics that are held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from smolexport.calibration import knapsack
from smolexport.calibration.knapsack import Allocation, Budget, Option, Unit
from smolexport.calibration.statistics import Input, Statistics, input_of
from smolexport.calibration.student import Student
from smolexport.calibration.trainer import Trainer, held_out
from smolexport.conversion.converter import Converter
from smolexport.conversion.encode import thread_count
from smolexport.conversion.plan import Entry, Plan
from smolexport.conversion.source_model import SourceModel
from smolexport.errors import CalibrationError, UsageError
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.spec import ModelSpec, Role, Tensor
from smolexport.plugins import trainer

SAMPLE = 256  # rows of a matrix that are rounded
HEAD = "lm_head.weight"  # under this name also where the head is tied
FELT = 16  # windows that sensitivities come from
ROUNDS = 4
NEAR = 0.9  # share of the target that is near enough
TOGETHER: Mapping[Role, str] = {
    Role.Q: "qkv", Role.K: "qkv", Role.V: "qkv", Role.GATE: "gate_up", Role.UP: "gate_up",
}  # fmt: skip

Choice = Sequence[Option]
Floats = NDArray[np.float64]


def bit_choices_of(modules: Sequence[Converter], spec: ModelSpec) -> dict[Tensor, tuple[int, ...]]:
    """Bits that all of `modules` can give each matrix, and all that must agree with it, most first."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in spec.tensors():
        groups.setdefault((tensor.layer, TOGETHER.get(tensor.role, tensor.role), tensor.part), []).append(tensor)
    found: dict[Tensor, tuple[int, ...]] = {}
    for group in groups.values():
        common = set.intersection(*(set(module.bit_choices(tensor)) for module in modules for tensor in group))
        found |= {tensor: tuple(sorted(common, reverse=True)) for tensor in group if common}
    return found


def top_bits(modules: Sequence[Converter], spec: ModelSpec) -> dict[Tensor, int]:
    """The most bits of each matrix: a plan to look at before anything is decided."""
    return {tensor: bits[0] for tensor, bits in bit_choices_of(modules, spec).items()}


@dataclass
class BitAllocator:
    """Decides for the formats of one export.

    Attributes:
        modules: the formats' converters.
        model: what is exported.
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
            UsageError: the budget cannot be met; names what can.
            CalibrationError: a statistic is missing or damaged.
            MissingDependencyError: no trainer is installed.
        """
        self._trainer: Trainer = trainer()
        self._choices = bit_choices_of(self.modules, self.model.spec)
        if not self._choices:
            raise UsageError(f"{self.model.name}: no matrix has rows that are a multiple of 32; no bits can be chosen")
        self._say("finding what each matrix costs ...")
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
        felt = windows[: max(1, min(FELT, len(windows) - held_out(len(windows))))]
        costs = Costs(self.source, self.statistics, self._trainer.sensitivity(self.source.folder, felt))
        ladder = {}
        for least in sorted({bits for choices in self._choices.values() for bits in choices}):
            bits = {t: min((b for b in found if b >= least), default=found[0]) for t, found in self._choices.items()}
            plans = self._plans(bits)
            ladder[least] = [{e.tensor: e for e in plan.entries if e.tensor is not None} for plan in plans]
        groups: dict[object, list[Tensor]] = {}
        for tensor in self._choices:
            groups.setdefault((tensor.layer, TOGETHER.get(tensor.role, tensor.role)), []).append(tensor)
        units = []
        for group in groups.values():
            options = []
            for choice in self._choices[group[0]]:
                entries = ladder[choice]
                nbytes = max(sum(found[t].nbytes for t in group) for found in entries)
                cost = sum(costs.of(t, [found[t] for found in entries]) for t in group)
                options.append(Option(choice, nbytes, cost))
            units.append(Unit(tuple(t.name for t in group), tuple(options)))
        return units

    def _bits(self, choice: Choice) -> dict[Tensor, int]:
        of = {name: o.bits for unit, o in zip(self.units, choice, strict=True) for name in unit.names}
        return {tensor: of[tensor.name] for tensor in self._choices}

    def _allocation(self, choice: Choice, measured: float | None) -> Allocation:
        windows = held_out(self.statistics.manifest.windows)
        return Allocation(self.budget, self._bits(choice), knapsack.cost_of(choice), measured, windows)

    def _largest(self, choice: Choice) -> int:
        """Bytes of the largest of the finished outputs, with the longest record in their metadata."""
        longest = replace(self._allocation(choice, 1.123456), predicted=1.123456)
        model = replace(self.model, bits=longest.bits, calibration=self.record(longest))
        return max(self.planned(module, model).size for module in self.modules)

    def _within(self, size: int) -> Choice:
        low = knapsack.least(self.units)
        other = self._largest(low) - knapsack.size_of(low)
        first = other
        while True:
            choice = knapsack.spend(self.units, size, first) if other == first else self._spent(low, size, other)
            excess = self._largest(choice) - size
            if excess <= 0 or choice == low:
                return choice
            other += excess

    def _spent(self, low: Choice, size: int, other: int) -> Choice:
        """What fits beside `other`, which grows with the choice: the least fits in any case."""
        return knapsack.spend(self.units, size, other) if size - other >= knapsack.size_of(low) else low

    def _reached(self, target: float) -> Allocation:
        if not self.budget.measure:
            return self._allocation(knapsack.reach(self.units, target), None)
        finest = knapsack.finest(self.units)
        factor, tried = 1.0, list[tuple[Choice, float]]()
        choice: Choice
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
                factor *= 1.02  # just met is not met
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
        self._say("encoding, and measuring what it costs ...")
        count = self.statistics.manifest.windows
        start = count - held_out(count)
        windows, teacher = self.statistics.windows()[start:], self.statistics.teacher(start)
        outputs: dict[object, Sequence[Entry]] = {}
        for plan in self._plans(self._bits(choice)):
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
        """`sensitivity`: by source name, what the torch runtime's `sensitivity` gives."""
        self._checkpoint, self._statistics, self._sensitivity = checkpoint, statistics, sensitivity
        size = checkpoint.spec.vocab_size
        counts = np.bincount(statistics.windows()[:, 1:].ravel(), minlength=size)[:size]
        self._frequencies: Floats = counts / max(1, counts.sum())
        self._last: tuple[Input, NDArray[np.float32]] | None = None  # matrices with one input stand together

    def of(self, tensor: Tensor, entries: Iterable[Entry]) -> float:
        """The most that one of `entries`, ways to store `tensor`, costs in nats per token.

        Raises:
            CalibrationError: a statistic is missing or damaged.
        """
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
                moved = np.einsum("ij,ij->i", error @ self._hessian(tensor), error).astype(np.float64)
                cost += float(products[rows] * scale @ np.maximum(moved, 0))
            if lookups.any():
                felt = self._felt(tensor.stored_name, tensor.shape[1])
                cost += float(self._frequencies[rows] * scale @ (error.astype(np.float64) ** 2 @ felt))
            found = max(found, cost / 2)
        return found

    def _weights(self, tensor: Tensor) -> tuple[Floats, Floats]:
        """How much each row matters as a factor of products, and as what is looked up, on comparable scales."""
        rows, nothing = tensor.shape[0], np.zeros(tensor.shape[0])
        if tensor.role is not Role.EMBED:
            return self._felt(HEAD if tensor.role is Role.HEAD else tensor.stored_name, rows), nothing
        lookups = self._frequencies * float(self._felt(tensor.stored_name, tensor.shape[1]).mean())
        if not self._checkpoint.spec.tied:
            return nothing, lookups
        return self._felt(HEAD, rows), lookups

    def _felt(self, name: str, outputs: int) -> Floats:
        found = self._sensitivity.get(name)
        if found is None or found.shape != (outputs,):
            raise CalibrationError(f"{self._checkpoint.folder}: {name}: the trainer gave no {outputs} sensitivities")
        return found

    def _hessian(self, tensor: Tensor) -> NDArray[np.float32]:
        key = input_of(tensor)
        if self._last is None or self._last[0] != key:
            self._last = None  # before the next one is read
            self._last = key, self._statistics.hessian(tensor)
        return self._last[1]


def sample(weights: Floats, count: int = SAMPLE) -> tuple[NDArray[np.int64], Floats]:
    """Numbers of at most `count` rows, and how many rows each stands for: the heaviest, and some of all others.

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

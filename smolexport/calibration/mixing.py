"""The scheme `mix` under a budget: what each matrix costs and takes, what is chosen, and what came of it.

Costs add up only while they are small, and leave out how errors of several matrices meet; so the divergence that is
told, and that `--max-kld` is about, is measured: the weights as a reader of the files sees them, on windows of the
statistics that are held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.calibration import budget as spending
from smolexport.calibration.budget import Budget, Mixed, Option, Unit
from smolexport.calibration.costs import Costs
from smolexport.calibration.distillation import held_out
from smolexport.calibration.methods import Calibration, Calibrator
from smolexport.calibration.statistics import Statistics
from smolexport.calibration.training import ENGINE, Student, lattice_of
from smolexport.checkpoint import Checkpoint
from smolexport.converter import Converter
from smolexport.errors import UsageError
from smolexport.model import Model
from smolexport.plan import Entry, Plan
from smolexport.plugins import runtime
from smolexport.spec import ModelSpec, Role, Tensor
from smolexport.stream import thread_count

__all__ = ["Mixer", "rungs_of", "top_bits"]

FELT = 16  # windows that sensitivities come from
ROUNDS = 4
NEAR = 0.9  # share of the target that is near enough
TOGETHER: Mapping[Role, str] = {
    Role.Q: "qkv", Role.K: "qkv", Role.V: "qkv", Role.GATE: "gate_up", Role.UP: "gate_up",
}  # fmt: skip

Rungs = Mapping[Tensor, tuple[int, ...]]
Choice = Sequence[Option]


def rungs_of(modules: Sequence[Converter], spec: ModelSpec) -> dict[Tensor, tuple[int, ...]]:
    """Bits that all of `modules` can give each matrix, and all that must agree with it, most first."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in spec.tensors():
        groups.setdefault((tensor.layer, TOGETHER.get(tensor.role, tensor.role), tensor.part), []).append(tensor)
    found: dict[Tensor, tuple[int, ...]] = {}
    for group in groups.values():
        common = set.intersection(*(set(module.rungs(tensor)) for module in modules for tensor in group))
        found |= {tensor: tuple(sorted(common, reverse=True)) for tensor in group if common}
    return found


def top_bits(modules: Sequence[Converter], spec: ModelSpec) -> dict[Tensor, int]:
    """The most bits of each matrix: a plan to look at before anything is decided."""
    return {tensor: rungs[0] for tensor, rungs in rungs_of(modules, spec).items()}


@dataclass
class Mixer:
    """Decides for the formats of one export.

    Attributes:
        modules: the formats' converters.
        model: what is exported.
        checkpoint: its weights.
        statistics: of it.
        calibration: method and budget.
        planned: (converter, model with bits) -> its plan.
    """

    modules: Sequence[Converter]
    model: Model
    checkpoint: Checkpoint
    statistics: Statistics
    calibration: Calibration
    planned: Callable[[Converter, Model], Plan]
    units: list[Unit] = field(default_factory=list, init=False)

    def decide(self) -> Mixed:
        """The bits of every matrix.

        Raises:
            UsageError: the budget cannot be met; names what can.
            CalibrationError: a statistic is missing or damaged.
            MissingDependencyError: torch is not installed.
        """
        budget = self.calibration.budget
        if budget is None:
            raise UsageError("a mix of bits needs a budget")
        self._engine: Any = runtime(ENGINE)
        self._calibrator = Calibrator(self.calibration, self.statistics)
        self._rungs = rungs_of(self.modules, self.model.spec)
        if not self._rungs:
            raise UsageError(f"{self.model.name}: has no matrix whose rows are multiples of 32, nothing can be chosen")
        self._say("finding what each matrix costs ...")
        self.units = self._measured_units()
        if budget.size is not None:
            choice = self._within(budget.size)
            kld = self._measured(choice) if budget.measure else None
            return self._mixed(choice, kld)
        return self._reached(budget)

    def _say(self, line: str) -> None:
        say = self.calibration.budget.say if self.calibration.budget else None
        if say:
            say(line)

    def _plans(self, bits: Mapping[Tensor, int]) -> list[Plan]:
        model = replace(self.model, bits=bits)
        return [self._calibrator.applied(self.planned(module, model)) for module in self.modules]

    def _measured_units(self) -> list[Unit]:
        windows = self.statistics.windows()
        felt = windows[: max(1, min(FELT, len(windows) - held_out(len(windows))))]
        costs = Costs(self.checkpoint, self.statistics, self._engine.sensitivity(self.checkpoint.folder, felt))
        ladder = {}
        for rung in sorted({rung for rungs in self._rungs.values() for rung in rungs}):
            bits = {t: min((r for r in rungs if r >= rung), default=rungs[0]) for t, rungs in self._rungs.items()}
            plans = self._plans(bits)
            ladder[rung] = [{e.tensor: e for e in plan.entries if e.tensor is not None} for plan in plans]
        groups: dict[object, list[Tensor]] = {}
        for tensor in self._rungs:
            groups.setdefault((tensor.layer, TOGETHER.get(tensor.role, tensor.role)), []).append(tensor)
        units = []
        for group in groups.values():
            options = []
            for rung in self._rungs[group[0]]:
                entries = ladder[rung]
                nbytes = max(sum(found[t].nbytes for t in group) for found in entries)
                cost = sum(costs.of(t, [found[t] for found in entries]) for t in group)
                options.append(Option(rung, nbytes, cost))
            units.append(Unit(tuple(t.name for t in group), tuple(options)))
        return units

    def _bits(self, choice: Choice) -> dict[Tensor, int]:
        of = {name: o.bits for unit, o in zip(self.units, choice, strict=True) for name in unit.names}
        return {tensor: of[tensor.name] for tensor in self._rungs}

    def _mixed(self, choice: Choice, measured: float | None) -> Mixed:
        windows = held_out(self.statistics.manifest.windows)
        budget = self.calibration.budget or Budget(size=1)
        return Mixed(budget, self._bits(choice), spending.cost_of(choice), measured, windows)

    def _largest(self, choice: Choice) -> int:
        """Bytes of the largest of the finished outputs, with the longest record in their metadata."""
        mixed = self._mixed(choice, 1.123456)
        record = Calibrator(self.calibration, self.statistics, replace(mixed, predicted=1.123456)).record()
        model = replace(self.model, bits=mixed.bits, calibration=record)
        return max(module.size(self.planned(module, model)) for module in self.modules)

    def _within(self, size: int) -> Choice:
        low = spending.least(self.units)
        other = self._largest(low) - spending.size_of(low)
        first = other
        while True:
            choice = spending.spend(self.units, size, first) if other == first else self._spent(low, size, other)
            excess = self._largest(choice) - size
            if excess <= 0 or choice == low:
                return choice
            other += excess

    def _spent(self, low: Choice, size: int, other: int) -> Choice:
        """What fits beside `other`, which grows with the choice: the least fits in any case."""
        return spending.spend(self.units, size, other) if size - other >= spending.size_of(low) else low

    def _reached(self, budget: Budget) -> Mixed:
        target = budget.max_kld or 0.0
        if not budget.measure:
            return self._mixed(spending.reach(self.units, target), None)
        finest = spending.finest(self.units)
        factor, tried = 1.0, list[tuple[Choice, float]]()
        choice: Choice
        for _ in range(ROUNDS):
            possible = spending.cost_of(finest) * factor <= target
            choice = spending.reach(self.units, target / factor) if possible else finest
            if any(choice == earlier for earlier, _ in tried):
                break
            kld = self._measured(choice)
            tried.append((choice, kld))
            self._say(f"predicted KLD {spending.cost_of(choice):.5f}, measured {kld:.5f}")
            if NEAR * target <= kld <= target:
                break
            factor = kld / max(spending.cost_of(choice), 1e-12)
            if kld > target:
                factor *= 1.02  # just met is not met
        if all(kld > target for _, kld in tried):
            tried.append((finest, self._measured(finest)))
        met = [(spending.size_of(choice), kld, choice) for choice, kld in tried if kld <= target]
        if not met:
            lowest = min(kld for _, kld in tried)
            raise UsageError(f"--max-kld {target:g}: {lowest:.2g} is the least that can be had, measured")
        _, kld, choice = min(met, key=lambda found: found[:2])
        return self._mixed(choice, kld)

    def _measured(self, choice: Choice) -> float:
        """Divergence of the finished weights on the held-out windows; of several formats, the largest."""
        self._say("encoding, and measuring what it costs ...")
        count = self.statistics.manifest.windows
        start = count - held_out(count)
        windows, teacher = self.statistics.windows()[start:], self.statistics.teacher(start)
        students: dict[object, Sequence[Entry]] = {}
        for plan in self._plans(self._bits(choice)):
            lattices = frozenset((e.tensor, lattice_of(e)) for e in plan.entries if e.is_matrix)
            students.setdefault(lattices, plan.entries)
        folder = self.checkpoint.folder
        return max(
            float(self._engine.divergence(folder, decoded(entries, self.checkpoint), windows, teacher))
            for entries in students.values()
        )


def decoded(entries: Sequence[Entry], checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(source name, values) of all tensors as a reader of the output will see them."""
    student = Student(entries, checkpoint, thread_count())
    solved = ((name, student.forms[name].decode(rows, student.columns[name])) for name, rows in student.rows.items())
    return chain(student.frozen(), solved)

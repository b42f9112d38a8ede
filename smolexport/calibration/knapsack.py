"""Bits per group of matrices under a budget, as a knapsack: every byte goes where it saves the most divergence.

A unit is a group of tensors with the same bits; its options are the ways to store it.  On each unit's lower convex hull
of cost over bytes every step saves less per byte than the one before it.  Taking the steps of all units in the order of
their saving is optimal at every size where a step ends, and at most one step away from it between two such sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from smolexport.errors import UsageError
from smolexport.model.spec import Tensor


@dataclass(frozen=True)
class Budget:
    """What an export may cost: either `size` or `target_kld`.

    Attributes:
        size: largest size of a file or folder in bytes.
        target_kld: largest divergence from the original, nats per token, on held-out windows of the statistics.
        measure: whether to measure the divergence; otherwise it is only predicted, for --dry-run.
        say: called with lines for people during the decision.
    """

    size: int | None = None
    target_kld: float | None = None
    measure: bool = True
    say: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.target_kld is None):
            raise UsageError("a budget is either --size or --target-kld: give one of them")
        if self.size is not None and self.size < 1:
            raise UsageError(f"--size {self.size}: must be at least 1 byte")
        if self.target_kld is not None and not 0 < self.target_kld < float("inf"):
            raise UsageError(f"--target-kld {self.target_kld}: must be above 0")


@dataclass(frozen=True)
class Option:
    """One way to store a unit: `bits` of each weight, `nbytes` in total, and its cost in divergence."""

    bits: int
    nbytes: int
    cost: float

    def saving(self, other: Option) -> float:
        """Divergence saved per byte by taking the larger `other` instead."""
        return (self.cost - other.cost) / (other.nbytes - self.nbytes)


@dataclass(frozen=True)
class Unit:
    """Tensors that get the same bits."""

    tensors: tuple[Tensor, ...]
    options: tuple[Option, ...]

    def hull(self) -> list[Option]:
        """The options on the lower convex hull of cost over bytes, smallest first; cost falls from each to the next."""
        found: list[Option] = []
        for option in sorted(self.options, key=lambda o: (o.nbytes, o.cost)):
            if found and (option.nbytes == found[-1].nbytes or option.cost >= found[-1].cost):
                continue
            while len(found) > 1 and found[-2].saving(found[-1]) <= found[-2].saving(option):
                found.pop()
            found.append(option)
        return found


Choice = list[Option]  # one for each unit


def size_of(choice: Sequence[Option]) -> int:
    """Bytes of all units."""
    return sum(option.nbytes for option in choice)


def cost_of(choice: Sequence[Option]) -> float:
    """Divergence of all units, which adds up as long as it is small."""
    return sum(option.cost for option in choice)


def least(units: Sequence[Unit]) -> Choice:
    """The smallest option of each unit."""
    return [unit.hull()[0] for unit in units]


def finest(units: Sequence[Unit]) -> Choice:
    """The option of each unit with the least divergence."""
    return [unit.hull()[-1] for unit in units]


def _steps(units: Sequence[Unit]) -> list[tuple[int, Option, Option]]:
    """(unit, option, next option) along all hulls, the largest saving first; those of one unit in order."""
    steps = [(number, a, b) for number, unit in enumerate(units) for a, b in pairwise(unit.hull())]
    return sorted(steps, key=lambda step: (-step[1].saving(step[2]), step[0], step[1].nbytes))


def spend(units: Sequence[Unit], size: int, other: int = 0) -> Choice:
    """The least divergence within `size` bytes, of which `other` are taken by everything else.

    Raises:
        UsageError: `size` is too small for any choice; names the least.
    """
    chosen = least(units)
    left = size - other - size_of(chosen)
    if left < 0:
        raise UsageError(f"--size {size:,}: {other + size_of(chosen):,} bytes are the least that this model takes")
    for number, before, after in _steps(units):
        price = after.nbytes - before.nbytes
        if chosen[number] == before and price <= left:
            chosen[number] = after
            left -= price
    # The bytes left may still pay for an option off the hull.
    rest = [
        (chosen[number].cost - option.cost, number, option)
        for number, unit in enumerate(units)
        for option in unit.options
        if option.cost < chosen[number].cost and option.nbytes - chosen[number].nbytes <= left
    ]
    if rest:
        _, number, option = max(rest, key=lambda found: (found[0], -found[1], -found[2].nbytes))
        chosen[number] = option
    return chosen


def reach(units: Sequence[Unit], kld: float) -> Choice:
    """The fewest bytes, step by step, whose predicted divergence is at most `kld`.

    Raises:
        UsageError: no choice has so little; names the least.
    """
    possible = cost_of(finest(units))
    if possible > kld:
        raise UsageError(f"--target-kld {kld:g}: {possible:.2g} is the least that can be had, predicted")
    chosen = least(units)
    for number, _, after in _steps(units):
        if cost_of(chosen) <= kld:
            break
        chosen[number] = after
    return chosen


@dataclass(frozen=True)
class Allocation:
    """The bits chosen under a budget.

    Attributes:
        budget: the budget.
        bits: of each matrix.
        predicted: divergence, nats per token, as the sum of the costs.
        measured: the same on held-out windows; None = nothing was encoded.
        windows: number of held-out windows.
    """

    budget: Budget
    bits: Mapping[Tensor, int]
    predicted: float
    measured: float | None
    windows: int

    def facts(self) -> dict[str, object]:
        """For the metadata of files."""
        limit = {"size": self.budget.size} if self.budget.size is not None else {"target_kld": self.budget.target_kld}
        found: dict[str, object] = {**limit, "predicted_kld": round(self.predicted, 6)}
        if self.measured is not None:
            found |= {"measured_kld": round(self.measured, 6), "held_out_windows": self.windows}
        return found

    def note(self) -> str:
        """A line for people."""
        counts = sorted(Counter(self.bits.values()).items(), reverse=True)
        shares = ", ".join(f"{count} at {bits}" for bits, count in counts)
        line = f"auto-bits: matrices by bits: {shares}; predicted KLD {self.predicted:.5f}"
        if self.measured is None:
            return f"{line}; the export measures it"
        return f"{line}, measured {self.measured:.5f} on {self.windows} held-out windows"

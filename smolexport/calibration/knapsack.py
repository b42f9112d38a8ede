"""What a budget buys, as a knapsack: bits per group of matrices, by the divergence that each byte takes away.

A unit is a group of tensors with the same bits; its options are the ways to store it.  On each unit's lower convex hull
of cost over bytes every step is worth less per byte than the one before it; taking the steps of all units in the order
of their worth is optimal at every size where a step ends, and between two such sizes at most one step away from it.
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
        size: most bytes of a file or folder.
        target_kld: largest divergence from the original, nats per token, on held-out windows of the statistics.
        measure: whether the divergence is measured; otherwise it is predicted alone, to look at a plan.
        say: called with lines for people while the decision is made.
    """

    size: int | None = None
    target_kld: float | None = None
    measure: bool = True
    say: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.target_kld is None):
            raise UsageError("a budget is either --size or --target-kld: give one of them")
        if self.size is not None and self.size < 1:
            raise UsageError(f"--size {self.size}: should be at least 1 byte")
        if self.target_kld is not None and not 0 < self.target_kld < float("inf"):
            raise UsageError(f"--target-kld {self.target_kld}: should be above 0")


@dataclass(frozen=True)
class Option:
    """One way to store a unit: `bits` of each weight, `nbytes` in all, and the divergence that it costs."""

    bits: int
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Unit:
    """Tensors, by their source names, that get the same bits."""

    names: tuple[str, ...]
    options: tuple[Option, ...]

    def hull(self) -> list[Option]:
        """The options on the lower convex hull of cost over bytes, from the smallest on; cost falls all along."""
        found: list[Option] = []
        for option in sorted(self.options, key=lambda o: (o.nbytes, o.cost)):
            if found and (option.nbytes == found[-1].nbytes or option.cost >= found[-1].cost):
                continue
            while len(found) > 1 and worth(found[-2], found[-1]) <= worth(found[-2], option):
                found.pop()
            found.append(option)
        return found


Choice = list[Option]  # one for each unit


@dataclass(frozen=True)
class Step:
    """From one option of unit number `unit` to the next on its hull."""

    unit: int
    before: Option
    after: Option


def worth(before: Option, after: Option) -> float:
    """Divergence that is saved per byte."""
    return (before.cost - after.cost) / (after.nbytes - before.nbytes)


def size_of(choice: Sequence[Option]) -> int:
    """Bytes of all units."""
    return sum(option.nbytes for option in choice)


def cost_of(choice: Sequence[Option]) -> float:
    """Divergence that all units cost, which adds up as long as it is small."""
    return sum(option.cost for option in choice)


def least(units: Sequence[Unit]) -> Choice:
    """The smallest option of each unit."""
    return [unit.hull()[0] for unit in units]


def finest(units: Sequence[Unit]) -> Choice:
    """The option of each unit that costs the least divergence."""
    return [unit.hull()[-1] for unit in units]


def steps_of(units: Sequence[Unit]) -> list[Step]:
    """All steps along the hulls, the most worth first; those of one unit in their order."""
    steps = []
    for number, unit in enumerate(units):
        hull = unit.hull()
        steps += [Step(number, a, b) for a, b in pairwise(hull)]
    return sorted(steps, key=lambda s: (-worth(s.before, s.after), s.unit, s.before.nbytes))


def spend(units: Sequence[Unit], size: int, other: int = 0) -> Choice:
    """The least divergence that `size` bytes buy.

    Args:
        units: with at least one option each.
        size: what may be used in all.
        other: bytes that all else takes, whatever is chosen.

    Raises:
        UsageError: it is too small for any choice; names the least.
    """
    chosen = least(units)
    left = size - other - size_of(chosen)
    if left < 0:
        raise UsageError(f"--size {size:,}: {other + size_of(chosen):,} bytes are the least that this model takes")
    for step in steps_of(units):
        price = step.after.nbytes - step.before.nbytes
        if chosen[step.unit] == step.before and price <= left:
            chosen[step.unit] = step.after
            left -= price
    # What is left may still buy something off the hull.
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
    """The fewest bytes, as steps go, with which the predicted divergence is at most `kld`.

    Raises:
        UsageError: nothing costs so little; names the least.
    """
    possible = cost_of(finest(units))
    if possible > kld:
        raise UsageError(f"--target-kld {kld:g}: {possible:.2g} is the least that can be had, predicted")
    chosen = least(units)
    for step in steps_of(units):
        if cost_of(chosen) <= kld:
            break
        chosen[step.unit] = step.after
    return chosen


@dataclass(frozen=True)
class Allocation:
    """The bits chosen under a budget.

    Attributes:
        budget: what was asked for.
        bits: of each matrix.
        predicted: divergence, nats per token, as the costs add up.
        measured: the same on held-out windows; None where nothing was encoded.
        windows: how many these are.
    """

    budget: Budget
    bits: Mapping[Tensor, int]
    predicted: float
    measured: float | None
    windows: int

    def facts(self) -> dict[str, object]:
        """For the metadata of files."""
        asked = {"size": self.budget.size} if self.budget.size is not None else {"target_kld": self.budget.target_kld}
        found: dict[str, object] = {**asked, "predicted_kld": round(self.predicted, 6)}
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

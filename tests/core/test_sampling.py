"""Samplers against their definitions, on random logits."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from smolexport.errors import SessionError, UsageError
from smolexport.run.sampling import Sampler, Sampling, min_p_mask, penalize, probabilities, top_k_mask, top_p_mask

# Half-integers make ties common; the wide floats make extremes common.
LOGITS = hnp.arrays(
    np.float64,
    st.integers(1, 40),
    elements=st.one_of(st.integers(-20, 20).map(lambda i: i / 2), st.floats(-1e4, 1e4, width=32)),
)


def choices(logits: NDArray[Any], sampling: Sampling, count: int) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.choose(np.asarray(logits, np.float32), []) for _ in range(count)]


@given(LOGITS, st.integers(1, 50))
def test_top_k_keeps_the_k_largest(logits: NDArray[np.float64], k: int) -> None:
    kept = top_k_mask(logits, k)
    assert kept.sum() == min(k, len(logits))
    if not kept.all():
        assert logits[kept].min() >= logits[~kept].max()


@given(LOGITS)
def test_top_k_prefers_the_first_among_equals(logits: NDArray[np.float64]) -> None:
    equal = np.full(len(logits), logits[0])
    assert top_k_mask(equal, 1).tolist() == [True] + [False] * (len(logits) - 1)


@given(LOGITS, st.floats(0.01, 0.999))
def test_top_p_is_the_smallest_set_that_reaches_p(logits: NDArray[np.float64], p: float) -> None:
    chances, kept = probabilities(logits), top_p_mask(logits, p)
    assert kept.any()
    assert chances[kept].sum() >= p - 1e-9
    assert chances[kept].sum() - chances[kept].min() < p + 1e-9
    if not kept.all():
        assert chances[kept].min() >= chances[~kept].max()


@given(LOGITS, st.floats(0, 1))
def test_min_p_compares_with_the_best(logits: NDArray[np.float64], p: float) -> None:
    chances, kept = probabilities(logits), min_p_mask(logits, p)
    assert kept[np.argmax(logits)]
    ratio = chances / chances.max()
    assert (ratio[kept] >= p * (1 - 1e-9)).all()
    assert (ratio[~kept] <= p * (1 + 1e-9)).all()


@given(LOGITS, st.floats(1e-300, 100))
def test_probabilities_sum_to_one(logits: NDArray[np.float64], temperature: float) -> None:
    chances = probabilities(logits, temperature)
    assert math.isclose(chances.sum(), 1, rel_tol=1e-12)
    assert (chances >= 0).all()


@given(LOGITS, st.lists(st.integers(0, 39), max_size=8), st.floats(1, 5))
def test_penalty_makes_seen_tokens_less_likely_once(
    logits: NDArray[np.float64], tokens: list[int], penalty: float
) -> None:
    seen = sorted({t % len(logits) for t in tokens})
    before = logits.copy()
    after = penalize(logits, [t % len(logits) for t in tokens] * 2, penalty)
    np.testing.assert_array_equal(logits, before)
    others = [i for i in range(len(logits)) if i not in seen]
    np.testing.assert_array_equal(after[others], logits[others])
    expected = [x / penalty if x > 0 else x * penalty for x in logits[seen]]
    np.testing.assert_array_equal(after[seen], expected)
    assert (after <= logits).all()


@given(LOGITS, st.integers(0, 2**32))
def test_zero_temperature_is_greedy_whatever_the_filters(logits: NDArray[np.float64], seed: int) -> None:
    best = int(np.argmax(np.asarray(logits, np.float32)))
    sampling = Sampling(temperature=0, top_k=3, top_p=0.5, min_p=0.1, seed=seed)
    assert choices(logits, sampling, 1) == [best]


@given(st.permutations(list(range(12))), st.integers(0, 2**32), st.sampled_from([1e-3, 1e-30, 5e-324]))
def test_temperature_towards_zero_is_greedy(order: list[int], seed: int, temperature: float) -> None:
    logits = np.asarray(order, np.float32)
    assert choices(logits, Sampling(temperature=temperature, seed=seed), 3) == [int(np.argmax(logits))] * 3


@given(LOGITS, st.integers(0, 2**32))
def test_top_k_one_is_greedy(logits: NDArray[np.float64], seed: int) -> None:
    assert choices(logits, Sampling(temperature=2, top_k=1, seed=seed), 1) == choices(logits, Sampling(), 1)


@given(LOGITS, st.integers(0, 2**32))
def test_same_seed_same_tokens(logits: NDArray[np.float64], seed: int) -> None:
    sampling = Sampling(temperature=0.8, top_k=10, top_p=0.95, min_p=0.02, seed=seed)
    assert choices(logits, sampling, 8) == choices(logits, sampling, 8)


def test_another_seed_other_tokens() -> None:
    runs = {tuple(choices(np.zeros(50), Sampling(temperature=1, seed=seed), 8)) for seed in range(8)}
    assert len(runs) == 8


@given(LOGITS, st.integers(0, 100))
@settings(max_examples=40)
def test_only_what_the_filters_leave_is_drawn(logits: NDArray[np.float64], seed: int) -> None:
    logits = np.asarray(np.asarray(logits, np.float32), np.float64)
    allowed = np.flatnonzero(top_k_mask(logits, 4))
    assert set(choices(logits, Sampling(temperature=3, top_k=4, seed=seed), 20)) <= set(allowed.tolist())


def test_frequencies_follow_the_distribution() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    drawn = Counter(choices(logits, Sampling(temperature=1, seed=1), 20_000))
    for token, chance in enumerate([0.5, 0.3, 0.15, 0.05]):
        # Five standard errors of a binomial share.
        assert abs(drawn[token] / 20_000 - chance) < 5 * math.sqrt(chance * (1 - chance) / 20_000)


def test_filters_come_before_the_temperature() -> None:
    # At temperature 1 the best two reach 0.9; at temperature 10 they would not, so the order shows.
    logits = np.log([0.6, 0.35, 0.03, 0.02])
    assert set(choices(logits, Sampling(temperature=10, top_p=0.9, seed=3), 300)) == {0, 1}


def test_filters_run_one_after_another() -> None:
    # Alone, top-p 0.7 keeps three of these; after top-k 2 the mass is renormalised and two suffice.
    logits = np.log([0.4, 0.25, 0.2, 0.15])
    assert top_p_mask(logits, 0.7).sum() == 3
    assert set(choices(logits, Sampling(temperature=1, top_k=2, top_p=0.7), 200)) == {0, 1}
    assert set(choices(logits, Sampling(temperature=1, top_k=2, top_p=0.6), 200)) == {0}


@pytest.mark.parametrize(("window", "expected"), [(None, 1), (3, 1), (2, 0), (0, 0)])
def test_penalty_window(window: int | None, expected: int) -> None:
    sampler = Sampler(Sampling(repetition_penalty=2, penalty_window=window))
    assert sampler.choose(np.asarray([1.0, 0.9, -5], np.float32), [0, 2, 2]) == expected


@given(LOGITS, st.integers(0, 100))
def test_forbidden_tokens_are_never_drawn(logits: NDArray[np.float64], seed: int) -> None:
    masked = np.concatenate([[-np.inf], logits, [-np.inf]])
    drawn = choices(masked, Sampling(temperature=1e3, seed=seed), 20)
    assert set(drawn) <= set(range(1, len(logits) + 1))


@pytest.mark.parametrize("bad", [[math.nan, 1], [1, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_an_error(bad: list[float], temperature: float) -> None:
    with pytest.raises(SessionError, match="not finite"):
        choices(np.asarray(bad), Sampling(temperature=temperature), 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.nan),
        ("penalty_window", -1),
        ("seed", -1),
    ],
)
def test_parameters_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        Sampling(**{field: value})

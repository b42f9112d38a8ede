"""Every figure against a plain float64 computation written from the definitions, one position at a time."""

from __future__ import annotations

import math
from operator import attrgetter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolexport.errors import UsageError
from smolexport.parity.metrics import Accumulator, percentile, read_predictions


def log_softmax(row):
    row = [float(x) for x in row]
    top = max(row)
    total = math.fsum(math.exp(x - top) for x in row)
    return [x - top - math.log(total) for x in row]


def by_hand(reference, candidate, following, floor=-16.0):
    """(divergence, -b[t], -q[t], Δp, same top) of each position."""
    rows = []
    for r, c, t in zip(reference, candidate, following, strict=True):
        b, q = log_softmax(r), log_softmax(c)
        kld = math.fsum(math.exp(x) * (x - y) for x, y in zip(b, q, strict=True) if x > floor)
        same = b.index(max(b)) == q.index(max(q))
        rows.append((kld, -b[t], -q[t], math.exp(q[t]) - math.exp(b[t]), float(same)))
    return np.array(rows).T


def run(reference, candidate, following, cuts=()):
    total = Accumulator()
    parts = [np.split(x, list(cuts)) for x in (reference, candidate, following)]
    for r, c, t in zip(*parts, strict=True):
        if len(t):
            total.add(read_predictions(r, t), read_predictions(c, t))
    return total.result()


def logits(seed, n=40, v=11, scale=3.0, noise=0.5):
    rng = np.random.default_rng(seed)
    reference = (rng.normal(size=(n, v)) * scale).astype(np.float32)
    candidate = (reference + noise * rng.normal(size=(n, v))).astype(np.float32)
    return reference, candidate, rng.integers(0, v, n)


def test_two_words_worked_out_on_paper():
    # p = (3/4, 1/4) against q = (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)
    reference = np.log(np.array([[3.0, 1.0]])).astype(np.float32)
    result = run(reference, np.zeros((1, 2), np.float32), np.array([0]))
    assert result.kld.mean.value == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)
    assert result.reference_perplexity.value == pytest.approx(4 / 3, rel=1e-7)
    assert result.perplexity.value == pytest.approx(2, rel=1e-7)
    assert result.perplexity_ratio.value == pytest.approx(1.5, rel=1e-7)
    assert result.delta_p.mean.value == pytest.approx(-0.25, abs=1e-7)
    assert math.isnan(result.kld.mean.error)


@pytest.mark.parametrize("seed", range(4))
def test_all_figures_against_the_definitions(seed):
    reference, candidate, following = logits(seed)
    kld, b, q, delta, same = by_hand(reference, candidate, following)
    n = len(kld)
    result = run(reference, candidate, following)

    def error(values):
        return math.sqrt((np.mean(values**2) - np.mean(values) ** 2) / (n - 1))

    assert result.positions == n
    assert result.divergences == pytest.approx(kld, rel=1e-12)
    assert result.kld.mean.value == pytest.approx(kld.mean(), rel=1e-12)
    assert result.kld.mean.error == pytest.approx(error(kld), rel=1e-9)
    assert result.kld.median == pytest.approx(np.median(kld), rel=1e-12)
    assert result.kld.max == pytest.approx(kld.max(), rel=1e-12)
    assert result.top1_agreement.value == same.mean()
    assert result.top1_agreement.error == pytest.approx(math.sqrt(same.mean() * (1 - same.mean()) / (n - 1)), rel=1e-12)
    assert result.reference_perplexity.value == pytest.approx(math.exp(b.mean()), rel=1e-12)
    assert result.reference_perplexity.error == pytest.approx(error(b) * math.exp(b.mean()), rel=1e-9)
    assert result.perplexity.value == pytest.approx(math.exp(q.mean()), rel=1e-12)
    assert result.perplexity.error == pytest.approx(error(q) * math.exp(q.mean()), rel=1e-9)
    covariance = (np.mean(b * q) - b.mean() * q.mean()) / (n - 1)
    assert result.ln_perplexity_ratio.value == pytest.approx(q.mean() - b.mean(), abs=1e-13)
    assert result.ln_perplexity_ratio.error == pytest.approx(
        math.sqrt(error(q) ** 2 + error(b) ** 2 - 2 * covariance), rel=1e-8
    )
    assert result.perplexity_ratio.value == pytest.approx(math.exp(q.mean()) / math.exp(b.mean()), rel=1e-12)
    assert result.perplexity_ratio.error == pytest.approx(
        result.perplexity_ratio.value * result.ln_perplexity_ratio.error, rel=1e-12
    )
    assert result.delta_p.mean.value == pytest.approx(delta.mean(), rel=1e-9)
    assert result.delta_p.mean.error == pytest.approx(error(delta), rel=1e-9)
    rms = math.sqrt(np.mean(delta**2))
    assert result.delta_p.rms.value == pytest.approx(rms, rel=1e-12)
    assert result.delta_p.rms.error == pytest.approx(0.5 / rms * error(delta**2), rel=1e-8)


def test_error_of_the_ratio_is_far_below_the_errors_of_its_parts():
    result = run(*logits(5, n=400, noise=0.05))
    assert result.ln_perplexity_ratio.error < 0.1 * result.perplexity.error / result.perplexity.value


def test_top_five_overlap_by_sets():
    reference, candidate, following = logits(9, v=30, noise=2.0)
    expected = [
        len({*np.argsort(-r)[:5]} & {*np.argsort(-c)[:5]}) / 5 for r, c in zip(reference, candidate, strict=True)
    ]
    assert 0 < np.mean(expected) < 1
    assert run(reference, candidate, following).top5_overlap == pytest.approx(np.mean(expected), rel=1e-12)


def test_first_of_equal_maxima_counts_as_the_top_word():
    tied = np.array([[1, 5, 5, 0], [5, 0, 0, 5]], np.float32)
    clear = np.array([[1, 5, 4, 0], [4, 0, 0, 5]], np.float32)
    assert run(tied, clear, np.array([0, 0])).top1_agreement.value == 0.5
    assert read_predictions(tied, np.array([0, 0])).top.tolist() == [[1, 2, 0, 3], [0, 3, 1, 2]]


def test_words_below_the_floor_are_left_out_of_the_divergence_only():
    reference = np.array([[0.0, -15.9, -16.1, -40.0]], np.float32)
    candidate = np.array([[0.0, -1.0, -1.0, -1.0]], np.float32)
    result = run(reference, candidate, np.array([3]))
    full = by_hand(reference, candidate, [3], floor=-math.inf)
    cut = by_hand(reference, candidate, [3])
    assert result.kld.mean.value == pytest.approx(cut[0][0], rel=1e-13)
    assert 0 < abs(full[0][0] - cut[0][0]) < 16 * math.exp(-16)
    assert result.reference_perplexity.value == pytest.approx(math.exp(cut[1][0]), rel=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 60),
    v=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_blocks_give_what_the_whole_gives(seed, n, v, cuts):
    reference, candidate, following = logits(seed, n, v)
    whole, streamed = run(reference, candidate, following), run(reference, candidate, following, sorted(cuts))
    assert streamed.divergences == pytest.approx(whole.divergences, rel=1e-11, abs=1e-15)
    assert streamed.kld.p99_9 == pytest.approx(whole.kld.p99_9, rel=1e-11, abs=1e-15)
    assert streamed.kld.mean.error == pytest.approx(whole.kld.mean.error, rel=1e-7, abs=1e-13, nan_ok=True)
    assert streamed.top1_agreement == whole.top1_agreement or n == 1
    assert streamed.top5_overlap == pytest.approx(whole.top5_overlap, rel=1e-12)
    for name in (
        "reference_perplexity",
        "perplexity",
        "ln_perplexity_ratio",
        "perplexity_ratio",
        "delta_p.mean",
        "delta_p.rms",
    ):
        one, other = attrgetter(name)(whole), attrgetter(name)(streamed)
        assert one.value == pytest.approx(other.value, rel=1e-10, abs=1e-13)
        assert one.error == pytest.approx(other.error, rel=1e-7, abs=1e-13, nan_ok=True)


def test_slices_of_a_wide_block_give_what_rows_give():
    # rows of 100,000 words are worked on two at a time
    reference, candidate, following = logits(3, n=5, v=100_000)
    whole, rows = run(reference, candidate, following), run(reference, candidate, following, [1, 2, 3, 4])
    assert whole.divergences == pytest.approx(rows.divergences, rel=1e-12)
    assert whole.divergences == pytest.approx(by_hand(reference, candidate, following)[0], rel=1e-11)
    assert whole.top5_overlap == pytest.approx(rows.top5_overlap)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), v=st.integers(1, 64), shift=st.integers(-64, 64))
def test_a_model_against_itself_shows_nothing(seed, v, shift):
    reference, _, following = logits(seed, v=v)
    # a quarter is kept exactly beside values on the same grid: only the common offset changes
    reference = np.round(reference * 1024) / np.float32(1024)
    result = run(reference, reference + np.float32(shift / 4), following)
    assert np.abs(result.divergences).max() < 1e-13
    assert (result.top1_agreement.value, result.top1_agreement.error, result.top5_overlap) == (1.0, 0.0, 1.0)
    assert result.perplexity_ratio.value == pytest.approx(1, abs=1e-13)
    assert abs(result.ln_perplexity_ratio.error) < 1e-13


def test_identical_logits_give_exact_zeros():
    reference, _, following = logits(1)
    result = run(reference, reference.copy(), following)
    assert not result.divergences.any()
    assert (result.perplexity_ratio.value, result.ln_perplexity_ratio.value, result.ln_perplexity_ratio.error) == (
        1.0,
        0.0,
        0.0,
    )
    assert (result.delta_p.rms.value, result.delta_p.rms.error) == (0.0, 0.0)


def test_divergence_is_positive_and_grows_with_the_damage():
    small, large = (run(*logits(2, n=300, noise=noise)) for noise in (0.1, 0.4))
    assert small.divergences.min() > -1e-6
    # second order in the disturbance: four times the noise, about sixteen times the divergence
    assert 10 < large.kld.mean.value / small.kld.mean.value < 22
    assert large.top1_agreement.value < small.top1_agreement.value
    assert large.delta_p.rms.value > small.delta_p.rms.value


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_percentiles_equal_numpy(values, share):
    ordered = np.sort(np.array(values))
    expected = np.quantile(ordered, share, method="linear")
    assert percentile(ordered, share) == pytest.approx(float(expected), rel=1e-9, abs=1e-6)


def test_percentiles_of_a_result_interpolate_between_positions():
    result = run(*logits(4, n=57))
    for share, value in ((0.5, result.kld.median), (0.99, result.kld.p99), (0.999, result.kld.p99_9)):
        assert value == pytest.approx(np.quantile(result.divergences, share), rel=1e-12)
    assert result.kld.median < result.kld.p99 < result.kld.p99_9 < result.kld.max


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_logits_reach_the_figures(value):
    reference, candidate, following = logits(6)
    candidate[3, 2] = value
    result = run(reference, candidate, following)
    assert not math.isfinite(result.kld.mean.value)
    assert result.divergences[4:] == pytest.approx(by_hand(reference[4:], candidate[4:], following[4:])[0])


def test_a_word_that_the_candidate_excludes_makes_an_infinite_divergence():
    reference, candidate, following = logits(6)
    candidate[3, 2] = -np.inf
    result = run(reference, candidate, following)
    assert result.kld.max == math.inf
    assert math.isfinite(result.kld.median)


def test_logits_near_the_end_of_float32_do_not_overflow():
    reference, candidate, following = logits(6, n=5)
    result = run(reference * np.float32(1e36), candidate * np.float32(1e36), following)
    assert not np.isnan(result.divergences).any()


def test_misfits_are_refused():
    reference, candidate, following = logits(0)
    with pytest.raises(UsageError, match="no position"):
        Accumulator().result()
    with pytest.raises(UsageError, match=r"\(40, 11\) do not match next tokens of shape \(39,\)"):
        read_predictions(reference, following[:-1])
    with pytest.raises(UsageError, match="next token 11 is outside the vocabulary of 11 tokens"):
        read_predictions(reference, following + 11 - following.max())
    with pytest.raises(UsageError, match="differ"):
        Accumulator().add(read_predictions(reference, following), read_predictions(candidate[:9], following[:9]))

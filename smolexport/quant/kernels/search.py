"""The searches for scales, one group of elements per lane, in the reference's order of summation.

Arguments that all searches share: `x`, `w` values and weights as `[element * WIDTH + lane]`, `n` elements per group.
A search returns lanes and never codes: those follow from `codes(inverse * (x - base))` with the pair that it returns
too, which costs less than keeping the codes of every trial.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smolexport.quant.kernels.codes import codes, low_bits, nearest
from smolexport.quant.kernels.jit import Array, helper
from smolexport.quant.kernels.lanes import WIDTH, any_lane, load, magnitude, negative, splat, store, where

ZERO, ONE, TENTH = np.float32(0), np.float32(1), np.float32(0.1)
TINY = np.float32(1e-15)  # groups below this count as zero


@helper
def search_range(
    x: Array,
    at: int,
    w: Array,
    n: int,
    top: int,
    start: np.float32,
    step: np.float32,
    trials: int,
    absolute: bool,
    c: Array,
) -> Any:
    """Scale s and minimum m <= 0 so that s * code + m with codes 0 ... top is near x.

    Each trial rounds with a slightly different number of levels and solves for s and m by least squares; the one with
    the smallest weighted error (squared, or `absolute`) wins.  The winner's m is the lower end of the range and the
    origin of the rounding in all later trials, as in the reference.

    Args:
        x, at, w, n: values, the group's first element in them, its weights, and its length.
        top: largest code.
        start, step, trials: trial t rounds with top + start + t * step levels.
        absolute: take the error's magnitude instead of its square.
        c: scratch for n elements.

    Returns:
        Lanes (s, -m, inverse, base); s is 0 for a group whose values are all the same and not above 0.
    """
    zero = splat(ZERO)
    low, high, sum_w, sum_x = range_sums(x, at, w, n)
    low = where(low > zero, zero, low)
    flat, flat_low = high == low, low
    inverse = splat(np.float32(top)) / (high - low)
    scale, base = splat(ONE) / inverse, low
    for e in range(n):
        store(c, e * WIDTH, codes(inverse * (load(x, (at + e) * WIDTH) - low), 0, top))
    best = range_error(x, at, w, n, c, scale, low, absolute)
    for trial in range(trials):
        levels = np.float32(np.float32(start + step * np.float32(trial)) + np.float32(top))
        this_inverse = splat(levels) / (high - low)
        determinant, this_scale, this_low = fit_range(x, at, w, n, top, this_inverse, low, sum_w, sum_x, c)
        error = range_error(x, at, w, n, c, this_scale, this_low, absolute)
        wins = (determinant > zero) & (error < best)
        inverse, base = where(wins, this_inverse, inverse), where(wins, low, base)
        best, scale, low = where(wins, error, best), where(wins, this_scale, scale), where(wins, this_low, low)
    scale, low = where(flat, zero, scale), where(flat, flat_low, low)
    inverse, base = where(flat, zero, inverse), where(flat, zero, base)
    return scale, negative(low), inverse, base


@helper
def range_sums(x: Array, at: int, w: Array, n: int) -> Any:
    """(minimum, maximum, sum of w, sum of w * x)."""
    first, weight = load(x, at * WIDTH), load(w, 0)
    low, high, sum_w, sum_x = first, first, weight, weight * first
    for e in range(1, n):
        value, weight = load(x, (at + e) * WIDTH), load(w, e * WIDTH)
        low, high = where(value < low, value, low), where(value > high, value, high)
        sum_w, sum_x = sum_w + weight, sum_x + weight * value
    return low, high, sum_w, sum_x


@helper
def fit_range(
    x: Array, at: int, w: Array, n: int, top: int, inverse: Any, low: Any, sum_w: Any, sum_x: Any, c: Array
) -> Any:
    """Round to codes, left in `c`, and solve for (determinant, scale, minimum <= 0) by weighted least squares."""
    zero = splat(ZERO)
    sum_l, sum_l2, sum_xl = zero, zero, zero
    for e in range(n):
        value = load(x, (at + e) * WIDTH)
        code = codes(inverse * (value - low), 0, top)
        store(c, e * WIDTH, code)
        weighted = load(w, e * WIDTH) * code
        sum_l, sum_l2, sum_xl = sum_l + weighted, sum_l2 + weighted * code, sum_xl + weighted * value
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    above = minimum > zero
    return determinant, where(above, sum_xl / sum_l2, scale), where(above, zero, minimum)


@helper
def range_error(x: Array, at: int, w: Array, n: int, c: Array, scale: Any, low: Any, absolute: bool) -> Any:
    """Weighted error of scale * c + low."""
    error = splat(ZERO)
    if absolute:
        for e in range(n):
            difference = scale * load(c, e * WIDTH) + low - load(x, (at + e) * WIDTH)
            error = error + load(w, e * WIDTH) * magnitude(difference)
    else:
        for e in range(n):
            difference = scale * load(c, e * WIDTH) + low - load(x, (at + e) * WIDTH)
            error = error + load(w, e * WIDTH) * (difference * difference)
    return error


@helper
def extreme_of(x: Array, at: int, n: int) -> Any:
    """(largest magnitude, value that has it) of the `n` values from `at` on, the first one of equals."""
    peak, extreme = splat(ZERO), splat(ZERO)
    for e in range(at, at + n):
        value = load(x, e * WIDTH)
        size = magnitude(value)
        peak, extreme = where(size > peak, size, peak), where(size > peak, value, extreme)
    return peak, extreme


@helper
def search_symmetric(x: Array, at: int, w: Array, n: int, levels: int) -> Any:
    """Scale s so that s * code with codes -levels ... levels - 1 is near x.

    Nineteen scales around the one that puts the value of largest magnitude at -levels; the best is the one with the
    largest projection, and its s is the least-squares one.

    Args:
        x, at, w, n: values, the group's first element in them, its weights, and its length.
        levels: half the number of codes.

    Returns:
        Lanes (s, inverse, mask of the groups that are zero); codes are codes(inverse * x), for zero groups `-levels`.
    """
    zero = splat(ZERO)
    peak, extreme = extreme_of(x, at, n)
    empty = peak < splat(TINY)
    inverse = splat(np.float32(-levels)) / extreme
    sum_xl, sum_l2 = projection(x, at, w, n, levels, inverse)
    scale = where(sum_l2 == zero, zero, sum_xl / sum_l2)
    best = scale * sum_xl
    for trial in range(-9, 10):
        if trial != 0:
            this_inverse = splat(np.float32(-np.float32(np.float32(levels) + TENTH * np.float32(trial)))) / extreme
            sum_xl, sum_l2 = projection(x, at, w, n, levels, this_inverse)
            wins = (sum_l2 > zero) & (sum_xl * sum_xl > best * sum_l2)
            this_scale = sum_xl / sum_l2
            scale, best = where(wins, this_scale, scale), where(wins, this_scale * sum_xl, best)
            inverse = where(wins, this_inverse, inverse)
    return where(empty, zero, scale), inverse, empty


@helper
def projection(x: Array, at: int, w: Array, n: int, levels: int, inverse: Any) -> Any:
    """(sum of w * x * code, sum of w * code * code)."""
    sum_xl, sum_l2 = splat(ZERO), splat(ZERO)
    for e in range(n):
        value, weight = load(x, (at + e) * WIDTH), load(w, e * WIDTH)
        code = codes(inverse * value, -levels, levels - 1)
        sum_xl, sum_l2 = sum_xl + weight * value * code, sum_l2 + weight * code * code
    return sum_xl, sum_l2


@helper
def search_sweeps(x: Array, at: int, n: int, levels: int, c: Array) -> Any:
    """For two groups, a scale s so that s * code with codes -levels ... levels - 1 is near x, weighted by its squares.

    From the codes that put the value of largest magnitude at -levels, up to five sweeps move single codes where that
    improves the projection.  The codes are left in `c` from element `at` on, -levels for a group that is zero.

    The groups are x[at : at + n] and the next n elements.  Each step depends on the sums of the step before it; two
    independent groups, interleaved, keep the processor busy while one alone would wait.

    Returns:
        Lanes of s for the first group and for the second.
    """
    empty_a, xl_a, l2_a = start_sweeps(x, at, n, levels, c)
    empty_b, xl_b, l2_b = start_sweeps(x, at + n, n, levels, c)
    for _sweep in range(5):
        moves = splat(ZERO) > splat(ZERO)
        for e in range(at, at + n):
            wins_a, xl_a, l2_a = move_code(x, e, levels, c, xl_a, l2_a)
            wins_b, xl_b, l2_b = move_code(x, e + n, levels, c, xl_b, l2_b)
            moves = moves | wins_a | wins_b
        if not any_lane(moves):
            break
    return end_sweeps(at, n, levels, c, empty_a, xl_a, l2_a), end_sweeps(at + n, n, levels, c, empty_b, xl_b, l2_b)


@helper
def start_sweeps(x: Array, at: int, n: int, levels: int, c: Array) -> Any:
    """The first codes of a group: lanes of whether it is zero, of sum w x code and of sum w code^2."""
    peak, extreme = extreme_of(x, at, n)
    inverse = splat(np.float32(-levels)) / extreme
    sum_xl, sum_l2 = splat(ZERO), splat(ZERO)
    for e in range(at, at + n):
        value = load(x, e * WIDTH)
        code, weight = codes(inverse * value, -levels, levels - 1), value * value
        store(c, e * WIDTH, code)
        sum_xl, sum_l2 = sum_xl + weight * value * code, sum_l2 + weight * code * code
    return peak < splat(TINY), sum_xl, sum_l2


@helper
def move_code(x: Array, e: int, levels: int, c: Array, sum_xl: Any, sum_l2: Any) -> Any:
    """Give element `e` the code that is best for the others' scale: lanes of whether that won, and of the new sums."""
    zero = splat(ZERO)
    value, code = load(x, e * WIDTH), load(c, e * WIDTH)
    weight = value * value
    rest_xl, rest_l2 = sum_xl - weight * value * code, sum_l2 - weight * code * code
    moved = codes(value * rest_l2 / rest_xl, -levels, levels - 1)
    new_xl, new_l2 = rest_xl + weight * value * moved, rest_l2 + weight * moved * moved
    possible = (rest_xl > zero) & (new_l2 > zero) & ((moved < code) | (moved > code))
    wins = possible & (new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2)
    store(c, e * WIDTH, where(wins, moved, code))
    return wins, where(wins, new_xl, sum_xl), where(wins, new_l2, sum_l2)


@helper
def end_sweeps(at: int, n: int, levels: int, c: Array, empty: Any, sum_xl: Any, sum_l2: Any) -> Any:
    """Lanes of the scale; the codes of a group that is zero become -levels."""
    for e in range(at, at + n):
        store(c, e * WIDTH, where(empty, splat(np.float32(-levels)), load(c, e * WIDTH)))
    return where(empty, splat(ZERO), where(sum_l2 > splat(ZERO), sum_xl / sum_l2, splat(ZERO)))


@helper
def search_positive(x: Array, w: Array, n: int, top: int, c: Array) -> Any:
    """Scale s so that s * code with codes 0 ... top is near x >= 0; the codes are left in `c`.

    Nine scales around the one that puts the largest value at `top`, then up to five sweeps that move single codes where
    that improves the projection.

    Returns:
        Lanes of s; s and the codes are 0 for a group that is zero.
    """
    zero = splat(ZERO)
    peak = zero
    for e in range(n):
        value = load(x, e * WIDTH)
        peak = where(peak > value, peak, value)
    empty = peak < splat(TINY)
    inverse = splat(np.float32(top)) / peak
    scale, best = splat(ONE) / inverse, zero
    for e in range(n):
        value = load(x, e * WIDTH)
        difference = value - scale * low_bits(nearest(inverse * value), 8)
        best = best + load(w, e * WIDTH) * difference * difference
    for trial in range(-4, 5):
        if trial != 0:
            this_inverse = splat(np.float32(TENTH * np.float32(trial) + np.float32(top))) / peak
            scale, error = splat(ONE) / this_inverse, zero
            for e in range(n):
                value = load(x, e * WIDTH)
                difference = value - scale * at_most(nearest(this_inverse * value), top)
                error = error + load(w, e * WIDTH) * difference * difference
            wins = error < best
            best, inverse = where(wins, error, best), where(wins, this_inverse, inverse)
    sum_xl, sum_l2 = zero, zero
    for e in range(n):
        value, weight = load(x, e * WIDTH), load(w, e * WIDTH)
        code = at_most(nearest(inverse * value), top)
        store(c, e * WIDTH, low_bits(code, 8))
        sum_xl, sum_l2 = sum_xl + weight * value * code, sum_l2 + weight * code * code
    for _sweep in range(5):
        sum_xl, sum_l2 = sweep_positive(x, w, n, top, c, sum_xl, sum_l2)
    for e in range(n):
        store(c, e * WIDTH, where(empty, zero, load(c, e * WIDTH)))
    return where(empty, zero, where(sum_l2 > zero, sum_xl / sum_l2, zero))


@helper
def sweep_positive(x: Array, w: Array, n: int, top: int, c: Array, sum_xl: Any, sum_l2: Any) -> Any:
    """Move each code once, with the others fixed, where the projection improves; a sweep without a move is idle."""
    zero = splat(ZERO)
    for e in range(n):
        value, weight, code = load(x, e * WIDTH), load(w, e * WIDTH), load(c, e * WIDTH)
        rest_xl, rest_l2 = sum_xl - weight * value * code, sum_l2 - weight * code * code
        moved = at_most(nearest(value * rest_l2 / rest_xl), top)
        new_xl, new_l2 = rest_xl + weight * value * moved, rest_l2 + weight * moved * moved
        possible = (rest_xl > zero) & (rest_l2 > zero) & ((moved < code) | (moved > code))
        wins = possible & (new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2)
        store(c, e * WIDTH, where(wins, low_bits(moved, 8), code))
        sum_xl, sum_l2 = where(wins, new_xl, sum_xl), where(wins, new_l2, sum_l2)
    return sum_xl, sum_l2


@helper
def at_most(a: Any, top: int) -> Any:
    """The smaller of each lane and `top`."""
    limit = splat(np.float32(top))
    return where(a > limit, limit, a)

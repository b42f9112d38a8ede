"""The extremes of WIDTH groups at once, beside numpy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.quant.kernels.jit import kernel
from smolexport.quant.kernels.lanes import WIDTH, extremes_of_groups, store


@kernel
def extremes(values: NDArray[Any], start: int, group: int, found: NDArray[Any]) -> None:
    """Write the smallest and the largest of WIDTH groups."""
    low, high = extremes_of_groups(values, start, group)
    store(found, 0, low)
    store(found, WIDTH, high)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("start", [0, 5])
def test_each_lane_has_the_extremes_of_its_group(group: int, start: int) -> None:
    values = np.random.default_rng(group).standard_normal(start + WIDTH * group).astype(np.float32)
    found = np.empty(2 * WIDTH, np.float32)
    extremes(values, start, group, found)
    groups = values[start:].reshape(WIDTH, group)
    assert np.array_equal(found[:WIDTH], groups.min(axis=1))
    assert np.array_equal(found[WIDTH:], groups.max(axis=1))


@pytest.mark.parametrize("element", range(32))
def test_no_place_in_a_group_is_passed_over(element: int) -> None:
    values = np.zeros((WIDTH, 32), np.float32)
    values[:, element] = np.arange(WIDTH) - np.float32(WIDTH / 2)
    found = np.empty(2 * WIDTH, np.float32)
    extremes(values.reshape(-1), 0, 32, found)
    assert np.array_equal(found, np.concatenate([values.min(axis=1), values.max(axis=1)]))

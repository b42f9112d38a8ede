"""Kinds of rows and of importance that scale searches find hard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Generator = np.random.Generator
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def gauss(rng: Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


def scaled(factor: float) -> Callable[[Generator, tuple[int, int]], NDArray[np.float32]]:
    return lambda rng, shape: gauss(rng, shape) * np.float32(factor)


def outlier(rng: Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    rows = gauss(rng, shape) * np.float32(0.01)
    rows[:, shape[1] // 3] = 100
    return rows


def half_empty(rng: Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    rows = gauss(rng, shape)
    rows[:, : shape[1] // 2] = 0
    return rows


def sparse(rng: Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    return np.where(rng.random(shape) < 0.03, gauss(rng, shape), np.float32(0))


def uneven_groups(rng: Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    spread = np.exp(6 * rng.standard_normal((shape[0], shape[1] // 16))).repeat(16, axis=1)
    return gauss(rng, shape) * spread.astype(np.float32)


def far_offset(rng: Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Groups far from zero: their spread is a few units in the last place, and a search may end below scale zero."""
    offset = (rng.standard_normal((shape[0], shape[1] // 16)) * 1e7).repeat(16, axis=1)
    return (rng.standard_normal(shape) + offset).astype(np.float32)


def few_columns(rng: Generator, columns: int) -> NDArray[np.float32]:
    return np.where(rng.random(columns) < 0.95, 0, 10.0 ** rng.uniform(-8, 8, columns)).astype(np.float32)


def signed_zeros(rng: Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    return np.where(rng.random(shape) < 0.5, np.float32(0.0), np.float32(-0.0))


FAMILIES: dict[str, Callable[[Generator, tuple[int, int]], NDArray[Any]]] = {
    "gauss": gauss,
    "weights": scaled(0.02),
    "student": lambda rng, shape: rng.standard_t(2.0, shape).astype(np.float32),
    "constant": lambda _rng, shape: np.full(shape, 0.37, np.float32),
    "constant-negative": lambda _rng, shape: np.full(shape, -0.37, np.float32),
    "zero": lambda _rng, shape: np.zeros(shape, np.float32),
    "signed-zeros": signed_zeros,
    "denormal": scaled(1e-40),
    "denormal-units": lambda rng, shape: (rng.integers(-3, 4, shape) * 1.4e-45).astype(np.float32),
    "1e-37": scaled(1e-37),
    "1e-30": scaled(1e-30),
    "1e-20": scaled(1e-20),
    "1e-15": scaled(1e-15),  # where the searches begin to take a group for zero
    "1e-8": scaled(1e-8),  # below the smallest float16
    "1e-6": scaled(1e-6),
    "1e5": scaled(1e5),  # beyond the largest float16
    "1e18": scaled(1e18),  # squares are finite, fourth powers are not
    "1e20": scaled(1e20),
    "1e37": scaled(1e37),
    "outlier": outlier,
    "negative": lambda rng, shape: -np.abs(gauss(rng, shape)),
    "positive": lambda rng, shape: np.abs(gauss(rng, shape)),
    "small-integers": lambda rng, shape: rng.integers(-4, 5, shape).astype(np.float32),  # ties everywhere
    "half-empty": half_empty,
    "sparse": sparse,
    "uneven-groups": uneven_groups,
    "far-offset": far_offset,
}

IMPORTANCES: dict[str, Callable[[Generator, int], NDArray[np.float32] | None]] = {
    "none": lambda _rng, _columns: None,
    "squares": lambda rng, columns: (rng.standard_normal(columns) ** 2).astype(np.float32),
    "half-zero": lambda rng, columns: np.maximum(rng.standard_normal(columns), 0).astype(np.float32),
    "zero": lambda _rng, columns: np.zeros(columns, np.float32),
    "few-columns": few_columns,
    "tiny": lambda rng, columns: (rng.random(columns) * 1e-30).astype(np.float32),
    "huge": lambda rng, columns: (rng.random(columns) * 1e30).astype(np.float32),
}

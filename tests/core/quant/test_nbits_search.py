"""The search for MatMulNBits' scales and zero points against ONNX Runtime's choice, block by block."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant.planar import NBits
from tests.core.quant import libmlx, libort, rows

SYMMETRIC, TYPES, GROUPS = (True, False), ("F32", "F16"), (32, 64, 128)


def errors(form: NBits, weights: NDArray[Any], importance: NDArray[np.float32] | None) -> NDArray[np.float64]:
    """Weighted squared error of each block, [n, blocks]."""
    count, columns = weights.shape
    decoded = form.decode(form.encode(weights, importance), columns).astype(np.float64)
    square = (decoded - weights.astype(np.float64)) ** 2 * (1 if importance is None else importance.astype(np.float64))
    whole = np.pad(square, ((0, 0), (0, -columns % form.group)))
    total: NDArray[np.float64] = whole.reshape(count, -1, form.group).sum(axis=2)
    return total


def both(values: tuple[Any, ...], weights: NDArray[Any], importance: NDArray[np.float32] | None) -> Any:
    return (errors(NBits(4, *values, encoder), weights, importance) for encoder in ("onnxruntime", "search"))


@pytest.mark.parametrize("values", [*product(GROUPS, TYPES, SYMMETRIC)], ids=str)
def test_no_block_is_worse(values: tuple[Any, ...]) -> None:
    rng, better = np.random.default_rng(9), 0
    for columns, family, kind in product((384, 90), rows.FAMILIES, rows.IMPORTANCES):
        importance = rows.IMPORTANCES[kind](rng, columns)
        with np.errstate(over="ignore"):
            made = rows.FAMILIES[family](rng, (5, 384)).astype(libmlx.DTYPES[values[1]])
        weights = np.ascontiguousarray(made[:, :columns])
        if np.isfinite(weights.astype(np.float32)).all():
            before, after = both(values, weights, importance)
            assert (after <= before).all(), (columns, family, kind)
            better += int((after < before).sum())
    assert better > 500


@pytest.mark.parametrize(
    ("group", "symmetric", "unweighted", "weighted"),
    [(32, True, 0.91, 0.76), (64, True, 0.92, 0.82), (32, False, 0.93, 0.76), (64, False, 0.93, 0.80)],
)
def test_error_is_clearly_smaller(group: int, symmetric: bool, unweighted: float, weighted: float) -> None:
    rng = np.random.default_rng(4)
    weights = rows.gauss(rng, (128, 512)).astype(np.float16)
    importance = (rng.standard_normal(512) ** 2).astype(np.float32)
    for limit, choice in ((unweighted, None), (weighted, importance)):
        before, after = both((group, "F16", symmetric), weights, choice)
        assert 0.9 * limit < after.sum() / before.sum() < limit


@pytest.mark.parametrize("symmetric", SYMMETRIC)
def test_zeros_stay_zeros(symmetric: bool) -> None:
    form = NBits(4, 32, "F16", symmetric, "search")
    for family in ("half-empty", "sparse", "zero"):
        weights = rows.FAMILIES[family](np.random.default_rng(2), (20, 256))
        decoded = form.decode(form.encode(weights), 256)
        assert (decoded[weights == 0] == 0).all(), family


@pytest.mark.parametrize("symmetric", SYMMETRIC)
def test_the_operator_multiplies_by_the_decoded_weights(symmetric: bool) -> None:
    form, rng = NBits(4, 32, "F32", symmetric, "search"), np.random.default_rng(3)
    data = form.encode(rows.gauss(rng, (24, 96)), rng.random(96, np.float32))
    activations = rng.standard_normal((7, 96)).astype(np.float32)
    found = libort.multiply(activations, data, form.parts(96), bits=4, block=32)
    wanted = activations.astype(np.float64) @ form.decode(data, 96).astype(np.float64).T
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("symmetric", SYMMETRIC)
def test_rows_are_independent(symmetric: bool) -> None:
    rng, form = np.random.default_rng(2), NBits(4, 32, "F16", symmetric, "search")
    for columns in (384, 90):
        weights, importance = rows.gauss(rng, (45, columns)), rng.random(columns, np.float32)
        whole = form.encode(weights, importance)
        pieces = [form.encode(weights[a:b], importance) for a, b in ((0, 1), (1, 34), (34, 45))]
        assert np.array_equal(whole, np.concatenate(pieces))
        assert np.array_equal(whole, form.encode(weights, importance * np.float32(2.0**60)))
        assert not np.array_equal(whole, form.encode(weights))


def test_eight_bits_and_names() -> None:
    weights = rows.gauss(np.random.default_rng(2), (9, 256))
    for symmetric in SYMMETRIC:
        before, after = (
            errors(NBits(8, 32, "F16", symmetric, encoder), weights.astype(np.float16), None)
            for encoder in ("onnxruntime", "search")
        )
        assert (after <= before).all()
    assert NBits(4, 32, "F16", True, "search").name == "int4-g32"
    with pytest.raises(UsageError, match="MatMulNBits: encoder is 'best', must be one of onnxruntime, search"):
        NBits(4, 32, "F16", True, "best")  # type: ignore[arg-type]

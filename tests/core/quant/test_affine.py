"""Affine groups: bytes and values against MLX, and the encoders that leave less error.

Axes: widths x groups x storage types x kinds of rows (`rows.FAMILIES`), with a number of groups that is not a multiple
of the vector width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant import Part, RowFormat
from smolexport.quant.planar import AffineFormat
from tests.core.quant import libmlx, rows

WIDTHS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
SHAPE = (9, 384)
ENCODERS = ("mlx", "recode", "search")

# SHA-256 of what MLX 0.32.4 makes of `libmlx.fixed_rows(7, 640)`, all groups, in F32, F16 and BF16.
HASHES = {
    2: "e4e959a198c00bc0",
    3: "76973da55b5d16d6",
    4: "9961c2744edd7801",
    5: "df257b96c5922359",
    6: "085237c3bf98cbc6",
    8: "98df2c2ebff67550",
}


def of_family(family: str, dtype: str, shape: tuple[int, int] = SHAPE) -> NDArray[Any] | None:
    """Rows of a kind, or None where the type cannot hold them."""
    with np.errstate(over="ignore"):
        made = rows.FAMILIES[family](np.random.default_rng(7), shape).astype(libmlx.DTYPES[dtype])
    return made if np.isfinite(made.astype(np.float32)).all() else None


def unpacked(form: AffineFormat, data: NDArray[np.uint8], columns: int) -> list[NDArray[np.float32]]:
    """Codes, scales and biases of every element, [n, columns] each, by numpy alone."""
    weight, *grids = libmlx.split(data, form.parts(columns))
    bits = np.unpackbits(weight, axis=1, bitorder="little").reshape(len(data), columns, form.bits)
    codes = (bits * (1 << np.arange(form.bits))).sum(axis=2).astype(np.float32)
    wide = [piece.view(libmlx.DTYPES[form.dtype]).astype(np.float32).repeat(form.group, axis=1) for piece in grids]
    return [codes, *wide]


def group_errors(
    form: AffineFormat, weights: NDArray[Any], importance: NDArray[np.float32] | None = None
) -> NDArray[np.float64]:
    """Weighted squared error of each group against what `dtype` makes of the weights."""
    exact = weights.astype(libmlx.DTYPES[form.dtype]).astype(np.float64)
    decoded = form.decode(form.encode(weights, importance), weights.shape[1])
    square = (decoded - exact) ** 2 * (1 if importance is None else importance.astype(np.float64))
    total: NDArray[np.float64] = square.reshape(len(weights), -1, form.group).sum(axis=2)
    return total


def relative_error(form: AffineFormat, weights: NDArray[Any]) -> float:
    return float(np.sqrt(group_errors(form, weights).sum() / (weights.astype(np.float64) ** 2).sum()))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_equals_mlx(bits: int, group: int) -> None:
    for dtype in libmlx.DTYPES:
        form = AffineFormat(bits, group, dtype)  # type: ignore[arg-type]
        for family in rows.FAMILIES:
            weights = of_family(family, dtype)
            if weights is None:
                continue
            found = form.encode(weights)
            assert np.array_equal(found, libmlx.quantize(weights, bits=bits, group_size=group)), (dtype, family)
            values = libmlx.dequantize(found, form.parts(SHAPE[1]), bits=bits, group_size=group)
            assert libmlx.same_bits(form.decode(found, SHAPE[1]), values), (dtype, family)


@st.composite
def problems(draw: st.DrawFn) -> NDArray[Any]:
    """Rows whose groups differ in size and offset, some with few distinct values."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, columns = draw(st.integers(1, 40)), 128 * draw(st.integers(1, 5))
    groups = (count, columns // 32)
    size = (10.0 ** rng.uniform(draw(st.integers(-12, -2)), 3, groups)).repeat(32, axis=1)
    offset = (rng.standard_normal(groups) * draw(st.sampled_from([0.0, 1.0, 10.0]))).repeat(32, axis=1)
    noise = rng.standard_normal((count, columns))
    if draw(st.booleans()):
        noise = np.rint(noise * 4) / 4
    weights = np.clip((noise + offset) * size, -6e4, 6e4)
    weights[rng.random(weights.shape) < draw(st.sampled_from([0.0, 0.5, 0.98]))] = 0
    return weights.astype(draw(st.sampled_from(list(libmlx.DTYPES.values()))))


@given(weights=problems(), bits=st.sampled_from(WIDTHS), group=st.sampled_from(GROUPS))
@settings(max_examples=80, deadline=None)
def test_equals_mlx_on_random_problems(weights: NDArray[Any], bits: int, group: int) -> None:
    dtype = next(name for name, kind in libmlx.DTYPES.items() if weights.dtype == kind)
    form = AffineFormat(bits, group, dtype)  # type: ignore[arg-type]
    assert np.array_equal(form.encode(weights), libmlx.quantize(weights, bits=bits, group_size=group))


@pytest.mark.parametrize("bits", WIDTHS)
def test_equals_stored_hashes(bits: int) -> None:
    weights, found = libmlx.fixed_rows(7, 640), []
    for dtype, kind in libmlx.DTYPES.items():
        for group in GROUPS:
            form = AffineFormat(bits, group, dtype)  # type: ignore[arg-type]
            found.append(form.encode(weights.astype(kind)).reshape(-1))
    assert libmlx.digest(np.concatenate(found)) == HASHES[bits]


@pytest.mark.parametrize("dtype", libmlx.DTYPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_decode_of_any_bytes_is_scale_times_code_plus_bias(bits: int, dtype: Any) -> None:
    form = AffineFormat(bits, 32, dtype)
    data = np.random.default_rng(bits).integers(0, 256, (31, form.row_bytes(96)), np.uint8)
    codes, scales, biases = unpacked(form, data, 96)
    with np.errstate(all="ignore"):
        assert libmlx.same_bits(form.decode(data, 96), scales * codes + biases)


@pytest.mark.parametrize("dtype", libmlx.DTYPES)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_rows_of_another_type_are_rounded_first(encoder: Any, dtype: Any) -> None:
    form = AffineFormat(4, 32, dtype, encoder)
    for kind in libmlx.DTYPES.values():
        weights = rows.gauss(np.random.default_rng(1), (5, 96)).astype(kind)
        assert np.array_equal(form.encode(weights), form.encode(weights.astype(libmlx.DTYPES[dtype])))


@pytest.mark.parametrize("bits", WIDTHS)
def test_recode_takes_the_nearest_code_on_the_stored_grid(bits: int) -> None:
    weights = of_family("uneven-groups", "BF16")
    assert weights is not None
    plain, better = AffineFormat(bits, 64, "BF16"), AffineFormat(bits, 64, "BF16", "recode")
    _, *grid = unpacked(plain, plain.encode(weights), SHAPE[1])
    codes, scales, biases = unpacked(better, better.encode(weights), SHAPE[1])
    assert np.array_equal(grid, [scales, biases])
    wanted = np.clip(np.rint((weights.astype(np.float32) - biases) / scales), 0, 2**bits - 1)
    assert np.array_equal(codes, wanted)


@pytest.mark.parametrize(
    ("bits", "group", "encoder", "limit"),
    [
        (8, 64, "mlx", 0.0073), (8, 64, "recode", 0.0055), (8, 64, "search", 0.0052),
        (8, 32, "mlx", 0.0065), (8, 32, "recode", 0.0049), (8, 32, "search", 0.0045),
        (4, 64, "mlx", 0.0912), (4, 64, "search", 0.0816), (4, 32, "mlx", 0.0813), (4, 32, "search", 0.0697),
        (2, 64, "mlx", 0.3960), (2, 64, "search", 0.3230),
    ],
)  # fmt: skip
def test_error_on_normal_weights(bits: int, group: int, encoder: Any, limit: float) -> None:
    weights = rows.gauss(np.random.default_rng(11), (256, 1024)).astype(libmlx.DTYPES["BF16"])
    error = relative_error(AffineFormat(bits, group, "BF16", encoder), weights)
    assert 0.97 * limit < error < limit


@pytest.mark.parametrize("kind", ["none", "squares", "half-zero", "zero", "few-columns", "tiny", "huge"])
@pytest.mark.parametrize(("bits", "group", "dtype"), [(2, 32, "F16"), (4, 64, "BF16"), (8, 128, "F32")])
def test_search_makes_no_group_worse_than_recode(bits: int, group: int, dtype: Any, kind: str) -> None:
    importance = rows.IMPORTANCES[kind](np.random.default_rng(5), SHAPE[1])
    better = 0
    for family in rows.FAMILIES:
        weights = of_family(family, dtype)
        if weights is None:
            continue
        before, after = (
            group_errors(AffineFormat(bits, group, dtype, name), weights, importance)  # type: ignore[arg-type]
            for name in ("recode", "search")
        )
        better += int((after < before).sum())
        assert (after <= before).all(), family
    assert better > 100 or kind == "zero"


def test_importance_moves_the_error_away_from_important_columns() -> None:
    weights = rows.gauss(np.random.default_rng(1), (32, 256))
    importance = np.where(np.arange(256) % 16 < 4, 100, 1).astype(np.float32)
    form = AffineFormat(4, 64, "BF16", "search")
    plain, aimed = (
        ((form.decode(form.encode(weights, choice), 256) - weights) ** 2 @ importance).mean()
        for choice in (None, importance)
    )
    assert aimed < 0.9 * plain
    assert np.array_equal(form.encode(weights), form.encode(weights, np.full(256, 3e30, np.float32)))


def ranges_error(weights: NDArray[Any], importance: NDArray[np.float32], group: int) -> float:
    """Weighted squared error of the best of 37 ranges with zero in them, each fitted by least squares, in float16."""
    x = weights.astype(np.float64).reshape(-1, group)
    w = np.broadcast_to(importance.astype(np.float64), weights.shape).reshape(-1, group)
    low, high = np.minimum(x.min(axis=1), 0)[:, None], np.maximum(x.max(axis=1), 0)[:, None]
    best = np.full(len(x), np.inf)
    for levels in 15 - 0.9 + 0.05 * np.arange(37):
        q = np.clip(np.rint((x - low) * levels / (high - low)), 0, 15)
        sum_w, sum_q, sum_qq, sum_x, sum_xq = ((w * part).sum(axis=1) for part in (1, q, q * q, x, x * q))
        scale = (sum_w * sum_xq - sum_x * sum_q) / (sum_w * sum_qq - sum_q * sum_q)
        least = (sum_qq * sum_x - sum_q * sum_xq) / (sum_w * sum_qq - sum_q * sum_q)
        scale, least = np.where(least > 0, sum_xq / sum_qq, scale), np.minimum(least, 0)
        s, m = (part.astype(np.float16).astype(np.float64)[:, None] for part in (scale, least))
        best = np.minimum(best, (w * (np.clip(np.rint((x - m) / s), 0, 15) * s + m - x) ** 2).sum(axis=1))
    return float(best.sum())


@pytest.mark.parametrize(("group", "limits"), [(32, (0.99, 0.93)), (64, (0.98, 0.91)), (128, (0.97, 0.90))])
def test_search_leaves_less_error_than_37_ranges(group: int, limits: tuple[float, float]) -> None:
    rng, form = np.random.default_rng(3), AffineFormat(4, group, "F16", "search")  # type: ignore[arg-type]
    weights = rows.gauss(rng, (64, 512)).astype(np.float16)
    for limit, importance in zip(limits, (np.ones(512), rng.standard_normal(512) ** 2), strict=True):
        weighting = importance.astype(np.float32)
        ratio = group_errors(form, weights, weighting).sum() / ranges_error(weights, weighting, group)
        assert 0.9 * limit < ratio < limit


@pytest.mark.parametrize("encoder", ENCODERS)
def test_rows_are_independent(encoder: Any) -> None:
    rng = np.random.default_rng(2)
    weights, importance, order = (
        rows.FAMILIES["student"](rng, (45, 384)),
        rng.random(384, np.float32),
        rng.permutation(45),
    )
    for bits, group in ((3, 32), (4, 128)):
        form = AffineFormat(bits, group, "BF16", encoder)
        whole = form.encode(weights, importance)
        pieces = [form.encode(weights[a:b], importance) for a, b in ((0, 1), (1, 34), (34, 45))]
        assert np.array_equal(whole, np.concatenate(pieces))
        assert np.array_equal(whole[order], form.encode(np.ascontiguousarray(weights[order]), importance))
        assert np.array_equal(form.decode(whole, 384)[order], form.decode(whole[order], 384))


def test_is_a_row_format() -> None:
    form: RowFormat = AffineFormat(3, 32, "F16")
    assert (form.name, form.block, form.canonical) == ("affine3-g32", 32, None)
    assert form.parts(64) == (Part("weight", "U32", 6), Part("scales", "F16", 2), Part("biases", "F16", 2))
    assert form.row_bytes(64) == 32
    assert form.size((2, 3, 64)) == 192
    assert AffineFormat(4, 64, "BF16").bits_per_weight == 4.5
    assert (
        form == AffineFormat(3, 32, "F16", "mlx") != AffineFormat(3, 32, "F16", "recode") != AffineFormat(3, 32, "F32")
    )
    assert len({form, AffineFormat(3, 32, "F16"), AffineFormat(3, 32, "BF16")}) == 2
    with pytest.raises(UsageError, match="affine3-g32: repacks no other format"):
        form.repack(np.zeros((1, 34), np.uint8), 32)
    with pytest.raises(UsageError, match="without axes"):
        form.size(())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_out_read_only_input_and_no_rows(encoder: Any) -> None:
    form = AffineFormat(5, 32, "F32", encoder)
    weights = rows.gauss(np.random.default_rng(3), (3, 96))
    wanted = form.encode(weights)
    weights.flags.writeable = False  # as mapped weights are
    out = np.full(wanted.size + 1, 255, np.uint8)[1:].reshape(wanted.shape)
    assert form.encode(weights, out=out) is out
    assert np.array_equal(out, wanted)
    assert np.array_equal(form.decode(out, 96), form.decode(wanted, 96))
    out.flags.writeable = False
    with pytest.raises(UsageError, match="out must be a writable"):
        form.encode(weights, out=out)
    assert form.encode(weights[:0]).shape == (0, form.row_bytes(96))
    assert form.decode(wanted[:0], 96).shape == (0, 96)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((7, 64, "F16"), "bits is 7, must be one of 2, 3, 4, 5, 6, 8"),
        ((1, 64, "F16"), "bits is 1"),
        ((4, 48, "F16"), "group is 48, must be one of 32, 64, 128"),
        ((4, 64, "F64"), "dtype is 'F64', must be one of F32, F16, BF16"),
        ((4, 64, "F16", "best"), "encoder is 'best', must be one of mlx, recode, search"),
    ],
)
def test_formats_that_do_not_exist(values: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AffineFormat(*values)


def test_bad_arguments() -> None:
    form = AffineFormat(4, 64, "F16")
    good = np.zeros((2, 64), np.float32)
    for bad in (good.astype(np.float64), good[0], good.T, np.zeros((4, 64), np.float32)[::2]):
        with pytest.raises(UsageError, match="affine4-g64: expected C-contiguous float32, float16 or bfloat16"):
            form.encode(bad)
    for columns in (0, 32, 65):
        assert not form.fits(columns)
        with pytest.raises(UsageError, match=f"affine4-g64: rows of {columns} elements are not whole blocks of 64"):
            form.encode(np.zeros((2, columns), np.float32))
    for importance, message in (
        (np.ones(63, np.float32), r"importance of shape \(63,\) for rows of 64"),
        (np.ones(64), "importance is float64"),
        (np.full(64, -1, np.float32), "importance of column 0 is -1"),
    ):
        with pytest.raises(UsageError, match=f"affine4-g64: {message}"):
            form.encode(good, importance)
    for data in (np.zeros((1, 35), np.uint8), np.zeros(36, np.uint8), np.zeros((1, 36), np.int8)):
        with pytest.raises(UsageError, match=r"affine4-g64: expected a C-contiguous uint8 array \[n, 36\]"):
            form.decode(data, 64)

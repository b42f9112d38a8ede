"""The table of formats, the checks in front of the kernels, and the search for values that are not finite."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from smolexport.errors import UsageError
from smolexport.quant import FORMATS, BlockFormat
from smolexport.quant.arrays import first_nonfinite
from tests.core.quant import rows

EVERY = {"argvalues": FORMATS.values(), "ids": list(FORMATS)}
WEIGHTED = [form for form in FORMATS.values() if form.weighted]


@pytest.mark.parametrize("form", **EVERY)
def test_table_agrees_with_gguf_py(form: BlockFormat) -> None:
    kind = gguf.GGMLQuantizationType[form.name.upper()]
    assert (form.ggml_type, (form.block, form.nbytes)) == (kind.value, gguf.GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize("form", **EVERY)
def test_sizes(form: BlockFormat) -> None:
    columns = 3 * form.block
    assert form.fits(columns)
    assert form.row_bytes(columns) == 3 * form.nbytes
    assert form.size((columns,)) == 3 * form.nbytes
    assert form.size((2, 5, columns)) == 30 * form.nbytes
    assert form.size((0, columns)) == 0
    assert form.bits_per_weight * columns == 8 * form.row_bytes(columns)


@pytest.mark.parametrize("form", [f for f in FORMATS.values() if f.block > 1], ids=lambda form: form.name)
@pytest.mark.parametrize("columns", [0, 1, 31, 33, 255, 257])
def test_rows_that_do_not_fit(form: BlockFormat, columns: int) -> None:
    assert not form.fits(columns)
    with pytest.raises(UsageError, match=f"{form.name}: rows of {columns} elements are not whole blocks"):
        form.row_bytes(columns)
    with pytest.raises(UsageError, match="whole blocks"):
        form.encode(np.zeros((2, columns), np.float32))


def test_names_are_keys_and_the_table_is_read_only() -> None:
    assert all(name == form.name == name.lower() for name, form in FORMATS.items())
    with pytest.raises(TypeError):
        FORMATS["q9"] = FORMATS["q8_0"]  # type: ignore[index]
    with pytest.raises(UsageError, match="without axes"):
        FORMATS["f32"].size(())


@pytest.mark.parametrize(
    "weights",
    [
        np.zeros((2, 64), np.float64),
        np.zeros((2, 64), np.uint16),
        np.zeros(64, np.float32),
        np.zeros((1, 2, 64), np.float32),
        np.zeros((64, 64), np.float32).T,
        np.zeros((4, 64), np.float32)[::2],
        np.zeros((2, 64), ">f4"),
    ],
    ids=["float64", "uint16", "1d", "3d", "transposed", "strided", "big-endian"],
)
def test_rows_of_a_wrong_kind(weights: np.ndarray[Any, Any]) -> None:
    with pytest.raises(UsageError, match="expected C-contiguous float32, float16 or bfloat16"):
        FORMATS["q8_0"].encode(weights)
    with pytest.raises(UsageError, match="expected C-contiguous float32, float16 or bfloat16"):
        first_nonfinite(weights)


@pytest.mark.parametrize("form", **EVERY)
def test_no_rows(form: BlockFormat) -> None:
    data = form.encode(np.zeros((0, 512), np.float32))
    assert data.shape == (0, form.row_bytes(512))
    assert form.decode(data, 512).shape == (0, 512)


@pytest.mark.parametrize("form", WEIGHTED, ids=lambda form: form.name)
@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (np.ones(255, np.float32), r"importance of shape \(255,\) for rows of 256"),
        (np.ones((1, 256), np.float32), r"importance of shape \(1, 256\)"),
        (np.ones(256, np.float64), "importance is float64"),
        (np.where(np.arange(256) == 7, -1, 1).astype(np.float32), "importance of column 7 is -1"),
        (np.where(np.arange(256) == 9, np.nan, 1).astype(np.float32), "importance of column 9 is nan"),
        (np.where(np.arange(256) == 3, np.inf, 1).astype(np.float32), "importance of column 3 is inf"),
    ],
    ids=["short", "2d", "float64", "negative", "nan", "inf"],
)
def test_importance_of_a_wrong_kind(form: BlockFormat, importance: np.ndarray[Any, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"{form.name}: {message}"):
        form.encode(np.zeros((1, 256), np.float32), importance)


def test_importance_is_checked_where_it_is_not_used() -> None:
    weights = rows.gauss(np.random.default_rng(0), (2, 64))
    assert np.array_equal(FORMATS["q8_0"].encode(weights, np.ones(64, np.float32)), FORMATS["q8_0"].encode(weights))
    with pytest.raises(UsageError, match="importance"):
        FORMATS["q8_0"].encode(weights, np.ones(63, np.float32))


@pytest.mark.parametrize("form", WEIGHTED, ids=lambda form: form.name)
def test_importance_moves_the_error_away_from_important_columns(form: BlockFormat) -> None:
    rng = np.random.default_rng(1)
    weights = rows.gauss(rng, (32, 256))
    importance = np.where(np.arange(256) % 16 < 4, 100, 1).astype(np.float32)
    plain, aimed = (
        (form.decode(form.encode(weights, choice), 256) - weights) ** 2 @ importance for choice in (None, importance)
    )
    assert aimed.mean() < plain.mean()


@pytest.mark.parametrize("form", **EVERY)
def test_out_and_read_only_input(form: BlockFormat) -> None:
    weights = rows.gauss(np.random.default_rng(2), (3, 512))
    weights.flags.writeable = False  # as mapped weights are
    out = np.full((3, form.row_bytes(512)), 255, np.uint8)
    assert form.encode(weights, out=out) is out
    assert np.array_equal(out, form.encode(weights.copy()))
    out.flags.writeable = False
    assert form.decode(out, 512).shape == (3, 512)
    with pytest.raises(UsageError, match="out must be a writable"):
        form.encode(weights, out=out)
    with pytest.raises(UsageError, match="out must be a writable"):
        form.encode(weights, out=np.empty((3, form.row_bytes(512) + 1), np.uint8))


def test_out_may_lie_at_any_address() -> None:
    weights = rows.gauss(np.random.default_rng(3), (3, 512))
    for form in FORMATS.values():
        size = form.size(weights.shape)
        out = np.zeros(size + 1, np.uint8)[1:].reshape(3, -1)
        assert np.array_equal(form.encode(weights, out=out), form.encode(weights))
        assert np.array_equal(form.decode(out, 512), form.decode(out.copy(), 512))


@pytest.mark.parametrize(
    "data",
    [np.zeros((1, 33), np.uint8), np.zeros(34, np.uint8), np.zeros((1, 34), np.int8), np.zeros((34, 1), np.uint8).T],
    ids=["short", "1d", "int8", "strided"],
)
def test_data_of_a_wrong_kind(data: np.ndarray[Any, Any]) -> None:
    if data.shape == (1, 34) and data.dtype == np.uint8:
        data = np.zeros((2, 68), np.uint8)[:, ::2]
    with pytest.raises(UsageError, match=r"q8_0: expected a C-contiguous uint8 array \[n, 34\]"):
        FORMATS["q8_0"].decode(data, 32)


@pytest.mark.parametrize("dtype", rows.DTYPES.values(), ids=list(rows.DTYPES))
def test_first_nonfinite(dtype: Any) -> None:
    rng = np.random.default_rng(4)
    weights = rows.gauss(rng, (37, 300)).astype(dtype)
    weights[5, 5], weights[6, 6] = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).smallest_subnormal
    assert first_nonfinite(weights) is None
    assert first_nonfinite(weights[:0]) is None
    for bad in (np.nan, np.inf, -np.inf):
        for row, column in ((0, 0), (36, 299), (13, 196), (13, 197)):  # 13 * 300 + 196 is the end of a tile of 4096
            spoiled = weights.copy()
            spoiled[row, column] = bad
            spoiled[36, 299] = np.nan
            assert first_nonfinite(spoiled) == (row, column)


def test_descriptions_of_formats_import_neither_numpy_nor_numba() -> None:
    code = (
        "import sys; from smolexport.quant import FORMATS, planar; FORMATS['q4_k'].size((2, 256)); "
        "planar.NBits(4, 32, 'F16', True).parts(64); sys.exit(bool({'numpy', 'numba', 'ml_dtypes'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

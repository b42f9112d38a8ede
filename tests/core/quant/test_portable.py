"""Portable groups: the weights of q4_0 and q8_0, bytes that MLX decodes to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant import FORMATS, Part, RowFormat
from smolexport.quant.planar import PortableFormat
from tests.core.quant import libmlx, rows

BOTH = (4, 8)
# SHA-256 of the rows that `libmlx.fixed_rows(7, 640)` becomes.
HASHES = {4: "164d6bb92e161a62", 8: "949e5a05409c8d95"}


def any_blocks(form: PortableFormat, count: int, columns: int, seed: int) -> NDArray[np.uint8]:
    """Rows of the canonical format with any codes and scales, zeros of both signs and subnormals among them."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (count, columns // 32, form.canonical.nbytes), np.uint8)
    scales = rng.choice([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x5BFF, 0xDBFF], data.shape[:2])
    scales = np.where(rng.random(scales.shape) < 0.5, scales, rng.integers(0, 0x10000, scales.shape)).astype("<u2")
    data[:, :, :2] = scales[:, :, None].view(np.uint8)
    return data.reshape(count, -1)


def scales_of(form: PortableFormat, blocks: NDArray[np.uint8], columns: int) -> NDArray[np.float64]:
    """Scale of every element, [n, columns]."""
    words = np.ascontiguousarray(blocks.reshape(len(blocks), -1, form.canonical.nbytes)[:, :, :2]).view(np.float16)
    return words[:, :, 0].astype(np.float64).repeat(32, axis=1)


@pytest.mark.parametrize("bits", BOTH)
@given(count=st.integers(1, 40), groups=st.integers(1, 20), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_repacked_blocks_are_the_same_weights(bits: Any, count: int, groups: int, seed: int) -> None:
    form, columns = PortableFormat(bits), 32 * groups
    blocks = any_blocks(form, count, columns, seed)
    scales = scales_of(form, blocks, columns)
    fits = np.abs(scales) <= 65504 / 2 ** (bits - 1)  # else the bias is infinite, and the stream refuses the tensor
    found, wanted = form.decode(form.repack(blocks, columns), columns), form.canonical.decode(blocks, columns)
    assert np.array_equal(found[fits], wanted[fits])
    assert not np.isfinite(found[~fits]).any()


@pytest.mark.parametrize("bits", BOTH)
def test_decoded_by_mlx(bits: Any) -> None:
    form = PortableFormat(bits)
    weights = rows.gauss(np.random.default_rng(1), (17, 352))
    data = form.encode(weights)
    values = libmlx.dequantize(data, form.parts(352), bits=bits, group_size=32)
    assert libmlx.same_bits(form.decode(data, 352), values)
    assert np.array_equal(values, form.canonical.decode(form.canonical.encode(weights), 352))


@pytest.mark.parametrize("family", rows.FAMILIES)
@pytest.mark.parametrize("bits", BOTH)
def test_encode_is_the_canonical_format_repacked(bits: Any, family: str) -> None:
    form, rng = PortableFormat(bits), np.random.default_rng(7)
    weights = rows.FAMILIES[family](rng, (17, 352))
    for importance in (None, rows.IMPORTANCES["squares"](rng, 352)):
        blocks = form.canonical.encode(weights, importance)
        found = form.encode(weights, importance)
        assert np.array_equal(found, form.repack(blocks, 352))
        wanted, values = form.canonical.decode(blocks, 352), form.decode(found, 352)
        fits = np.abs(scales_of(form, blocks, 352)) <= 65504 / 2 ** (bits - 1)
        assert np.array_equal(values[fits], wanted[fits])


@pytest.mark.parametrize("bits", BOTH)
def test_equals_stored_hashes(bits: Any) -> None:
    assert libmlx.digest(PortableFormat(bits).encode(libmlx.fixed_rows(7, 640))) == HASHES[bits]


@pytest.mark.parametrize("bits", BOTH)
def test_rows_are_independent(bits: Any) -> None:
    # More rows than `encode` hands on at once.
    rng, form = np.random.default_rng(2), PortableFormat(bits)
    weights, importance, order = rows.gauss(rng, (3000, 256)), rng.random(256, np.float32), rng.permutation(3000)
    whole = form.encode(weights, importance)
    assert np.array_equal(whole, np.concatenate([form.encode(w, importance) for w in np.split(weights, [1, 34])]))
    assert np.array_equal(whole[order], form.encode(np.ascontiguousarray(weights[order]), importance))
    assert np.array_equal(whole, form.repack(form.canonical.encode(weights, importance), 256))
    out = np.zeros(whole.size + 1, np.uint8)[1:].reshape(whole.shape)
    assert form.encode(weights, importance, out) is out
    assert np.array_equal(out, whole)


def test_is_a_row_format() -> None:
    form: RowFormat = PortableFormat(4)
    assert (form.name, form.block, form.canonical) == ("s32x4", 32, FORMATS["q4_0"])
    assert (PortableFormat(8).name, PortableFormat(8).canonical) == ("s32x8", FORMATS["q8_0"])
    assert form.parts(64) == (Part("weight", "U32", 8), Part("scales", "F16", 2), Part("biases", "F16", 2))
    assert form.row_bytes(64) == 40
    assert PortableFormat(8).bits_per_weight == 9
    assert len({form, PortableFormat(4), PortableFormat(8)}) == 2


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="portable groups: bits is 5, must be one of 4, 8"):
        PortableFormat(5)  # type: ignore[arg-type]
    form = PortableFormat(4)
    for columns in (0, 16, 33):
        with pytest.raises(UsageError, match=f"s32x4: rows of {columns} elements are not whole blocks of 32"):
            form.encode(np.zeros((2, columns), np.float32))
        with pytest.raises(UsageError, match="not whole blocks"):
            form.repack(np.zeros((2, 18), np.uint8), columns)
    good = np.zeros((2, 64), np.float32)
    with pytest.raises(UsageError, match="s32x4: expected C-contiguous float32"):
        form.encode(good.T)
    with pytest.raises(UsageError, match="s32x4: importance"):
        form.encode(good, np.ones(63, np.float32))
    with pytest.raises(UsageError, match="s32x4: out must be a writable"):
        form.encode(good, out=np.empty((2, 35), np.uint8))
    for call, width in ((form.decode, 40), (form.repack, 36)):
        with pytest.raises(UsageError, match=rf"s32x4: expected a C-contiguous uint8 array \[n, {width}\]"):
            call(np.zeros((1, width + 1), np.uint8), 64)
    assert form.encode(good[:0]).shape == form.repack(np.zeros((0, 36), np.uint8), 64).shape == (0, 40)

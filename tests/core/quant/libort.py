"""ONNX Runtime's own quantizer for MatMulNBits, and the operator itself, as oracles for our codec."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.quant import Part
from tests.core.quant import libmlx

REASON = "no onnxruntime installed: bytes are compared with stored hashes only"


def quantize(weights: NDArray[Any], bits: int, block: int, *, symmetric: bool) -> NDArray[np.uint8]:
    """[n, row_bytes]: what the quantizer makes of float32 or float16 weights, its arrays one after another in a row."""
    state = pytest.importorskip("onnxruntime.capi._pybind_state", reason=REASON)
    function = state.quantize_matmul_4bits if bits == 4 else state.quantize_matmul_8bits
    count, columns = weights.shape
    blocks = -(-columns // block)
    filled = np.pad(weights, ((0, 0), (0, blocks * block - columns)))
    codes = np.zeros((count, blocks, block * bits // 8), np.uint8)
    scales, zeros = np.zeros((count, blocks), weights.dtype), np.zeros((count, -(-blocks * bits // 8)), np.uint8)
    function(codes, np.ascontiguousarray(filled.T), scales, zeros, block, count, columns, symmetric)
    parts = [codes.reshape(count, -1), scales.view(np.uint8)]
    return np.concatenate(parts if symmetric else [*parts, zeros], axis=1)


def multiply(
    activations: NDArray[Any], data: NDArray[np.uint8], parts: tuple[Part, ...], *, bits: int, block: int
) -> NDArray[Any]:
    """[m, n]: what MatMulNBits makes of activations [m, columns] and encoded rows, at accuracy level 0."""
    helper = pytest.importorskip("onnx.helper", reason="no onnx installed: the operator is not run")
    runtime = pytest.importorskip("onnxruntime", reason=REASON)
    columns, blocks = activations.shape[1], -(-activations.shape[1] // block)
    float_type = helper.np_dtype_to_tensor_dtype(activations.dtype)
    kinds = {"U8": np.uint8, "F16": np.float16, "F32": np.float32}
    arrays = [piece.view(kinds[part.dtype]) for piece, part in zip(libmlx.split(data, parts), parts, strict=True)]
    shapes = [(len(data), blocks, block * bits // 8), (arrays[1].size,), (arrays[-1].size,)]
    weights = [
        helper.make_tensor(part.suffix, helper.np_dtype_to_tensor_dtype(array.dtype), shape, array.tobytes(), raw=True)
        for part, array, shape in zip(parts, arrays, shapes, strict=False)
    ]
    node = helper.make_node(
        "MatMulNBits",
        ["A", *(part.suffix for part in parts)],
        ["Y"],
        domain="com.microsoft",
        K=columns,
        N=len(data),
        bits=bits,
        block_size=block,
        accuracy_level=0,
    )
    ends = [helper.make_tensor_value_info(name, float_type, None) for name in ("A", "Y")]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: NDArray[Any] = session.run(None, {"A": activations})[0]
    return result

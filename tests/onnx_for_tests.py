"""Playing a graph with plain onnxruntime, and what the tests of ONNX folders share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray


def onnxruntime() -> Any:
    """The library, or a skip that says why."""
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def session(graph: Path) -> Any:
    """The graph on one thread of the CPU."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def play(
    graph: Path, tokens: Sequence[int] | NDArray[Any], blocks: Sequence[int] = (), keep: int | None = None
) -> NDArray[np.float32]:
    """Logits [rows, v] of `tokens`, appended in blocks that end before the places in `blocks`; None: `keep` not fed."""
    opened = session(graph)
    past = {i.name: i for i in opened.get_inputs() if i.name.startswith("past_key_values.")}
    caches: dict[str, NDArray[Any]] = {
        name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float16 if "float16" in i.type else np.float32)
        for name, i in past.items()
    }
    names, rows, total = [o.name for o in opened.get_outputs()], [], 0
    for part in np.split(np.asarray(tokens, np.int64), blocks):
        total += len(part)
        feeds = {"input_ids": part[None], "attention_mask": np.ones((1, total), np.int64), **caches}
        if keep is not None:
            feeds["num_logits_to_keep"] = np.array(keep, np.int64)
        results = dict(zip(names, opened.run(None, feeds), strict=True))
        rows.append(results["logits"][0])
        caches = {name: results[name.replace("past_key_values", "present")] for name in past}
    return np.concatenate(rows)


def torch_logits(checkpoint: Path, tokens: NDArray[Any], weights: Any = None) -> NDArray[np.float32]:
    """Logits [n, v] of torch in float32, of the checkpoint or of other `weights` in it."""
    pytest.importorskip("torch")
    import smolexport_on_torch

    with smolexport_on_torch.open(checkpoint, dtype="f32", threads=1, context=512, weights=weights) as opened:
        return opened.append(tokens)


def divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean KLD over positions, nats; [n, v] logits each."""

    def log_probabilities(x: NDArray[np.float32]) -> NDArray[np.float64]:
        y = x.astype(np.float64) - x.max(-1, keepdims=True)
        return np.asarray(y - np.log(np.exp(y).sum(-1, keepdims=True)))

    p, q = log_probabilities(reference), log_probabilities(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def relative(other: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Relative error."""
    return float(np.linalg.norm(other - reference) / np.linalg.norm(reference))

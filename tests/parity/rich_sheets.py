"""A comparison with everything on it, for the tests of the reports: real figures, and the rest by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from smolexport.parity.candidates import short_names
from smolexport.parity.metrics import histogram, percentile
from smolexport.parity.report import json_schema
from smolexport.parity.results import (
    Accuracy,
    Attribution,
    CandidateResult,
    Comparison,
    Divergence,
    Estimate,
    Greedy,
    Pair,
    WeightError,
)
from smolexport.parity.thresholds import Thresholds

__all__ = ["enriched", "judged_by", "keeps_to_schema", "moved", "named", "scaled"]

ENVIRONMENT = {
    "system": "Linux 6.8 x86_64", "processor": "AMD EPYC 7B13", "cores": "2", "threads": "2", "python": "3.11.9",
    "smolexport": "0.1.0", "torch": "2.13.0", "llama-cpp-python": "0.3.36", "onnxruntime": "1.31.1",
}  # fmt: skip
BANDWIDTH = 23.4e9


def scaled(accuracy: Accuracy, factor: float) -> Accuracy:
    """The same positions with `factor` times the divergence, every figure of it to match."""
    values = accuracy.divergences * factor
    ordered, spread = np.sort(values), accuracy.kld
    shares = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999, "max": 1.0}
    kld = dataclasses.replace(
        spread,
        mean=Estimate(spread.mean.value * factor, spread.mean.error * factor),
        **{name: percentile(ordered, share) for name, share in shares.items()},
    )
    # of the positions that differ, so many differ still
    same = accuracy.same_top | (np.arange(len(values)) % 100 >= 100 * min(1.0, factor**0.5))
    top1 = Estimate(float(same.mean()), accuracy.top1_agreement.error)
    return dataclasses.replace(
        accuracy, kld=kld, divergences=values, same_top=same, top1_agreement=top1, kld_histogram=histogram(values)
    )


def moved(result: CandidateResult, **facts: Any) -> CandidateResult:
    """The same figures of another file: `path`, `runtime` or other facts of `ModelInfo`."""
    return dataclasses.replace(result, model=dataclasses.replace(result.model, **facts))


def named(comparison: Comparison, *results: CandidateResult) -> Comparison:
    """`comparison` of `results`, which get the names that `compare` would give them."""
    names = short_names([(one.model.path, one.model.runtime) for one in results])
    return dataclasses.replace(
        comparison, candidates=tuple(moved(one, name=name) for one, name in zip(results, names, strict=True))
    )


def judged_by(comparison: Comparison, thresholds: Thresholds) -> Comparison:
    """`comparison` with other thresholds, as each candidate gets them."""
    candidates = tuple(
        dataclasses.replace(one, thresholds=thresholds.thresholds_for(one.model)) for one in comparison.candidates
    )
    return dataclasses.replace(comparison, candidates=candidates, thresholds=thresholds)


def errors(layers: int, size: float) -> tuple[WeightError, ...]:
    """As many layers' relative errors, about `size`, with the embedding and the norms outside of them."""
    inside = [
        WeightError(f"model.layers.{layer}.{name}.weight", layer, 65536, size * (1 + 0.06 * layer + 0.1 * place))
        for layer in range(layers)
        for place, name in enumerate(("self_attn.q_proj", "mlp.down_proj"))
    ]
    embedding = WeightError("model.embed_tokens.weight", None, 1 << 20, size / 12)
    head = WeightError("lm_head.weight", None, 1 << 20, size / 9)
    return embedding, *inside, WeightError("model.norm.weight", None, 256, 0.0), head


def enriched(comparison: Comparison) -> Comparison:
    """`comparison` with a noise floor, attributions, tensor errors, a pair, shares of the bandwidth, an environment."""
    accuracy = comparison.candidates[0].accuracy
    candidates = []
    for place, result in enumerate(comparison.candidates):
        own = result.accuracy
        speed = result.speed
        share = speed.decode_tok_s.value * result.model.bytes / BANDWIDTH if speed else None
        parts = Attribution(scaled(own, 0.93), scaled(accuracy, 0.004 * (1 + place)))
        candidates.append(
            dataclasses.replace(
                result,
                fingerprint="6c28a28d9dc8c7b9d7c5c34ba4c3efde",
                attribution=parts,
                bandwidth_share=share,
                tensor_errors=errors(6, 0.006 + 0.05 * place),
            )
        )
    greedy = Greedy(
        64,
        (
            Divergence(64, 9, 0.031, 262, 285, "the old man opened the door and looked at", " the", " his"),
            Divergence(64),
            Divergence(64, 41, 1.2, 13, 198, "'I do not know,' she said", ".", "\n"),
        ),
    )
    candidates[0] = dataclasses.replace(candidates[0], greedy=greedy)
    reference = dataclasses.replace(comparison.reference, noise_floor=scaled(accuracy, 0.01), bandwidth_share=0.31)
    whole = dataclasses.replace(
        comparison,
        candidates=tuple(candidates),
        reference=reference,
        pairs=(Pair(0, len(candidates) - 1, scaled(accuracy, 0.02)),) if len(candidates) > 1 else (),
        environment=ENVIRONMENT,
        bandwidth_bytes_per_s=BANDWIDTH,
    )
    return judged_by(whole, Thresholds(max_kld=0.5, min_top1=0.5))


def keeps_to_schema(sheet: dict[str, Any]) -> None:
    """Fail if `sheet` is not what the generated schema says."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(sheet)

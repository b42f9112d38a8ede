"""A comparison as plain JSON values.

Every figure that any report shows stands here: Markdown and HTML are made from this alone.  `schema.json` beside this
file describes it; `schema` in the output is that file's version and changes when a field changes its meaning or goes.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from functools import cache
from importlib import resources
from typing import Any

from smolexport.parity.inputs import Candidate
from smolexport.parity.methods import Row, side_by_side
from smolexport.parity.report.distribution import EDGES, by_position, histogram
from smolexport.parity.report.names import reference_name, short_names
from smolexport.parity.results import (
    Accuracy,
    Attribution,
    CandidateResult,
    Comparison,
    Divergence,
    Estimate,
    Greedy,
    Pair,
    ReferenceResult,
    Speed,
    TensorError,
    TextFacts,
    Thresholds,
)

__all__ = ["SCHEMA", "json_schema", "model_json", "speed_json", "to_json"]

SCHEMA = 1


@cache
def _schema_text() -> str:
    return (resources.files("smolexport.parity.report") / "schema.json").read_text(encoding="utf-8")


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) that `to_json` keeps to."""
    import json

    return dict(json.loads(_schema_text()))


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Plain JSON values only; figures that do not exist or are not finite are None."""
    text, thresholds = comparison.text, comparison.thresholds
    models = [result.model for result in comparison.candidates]
    names = short_names([(model.path, model.runtime.NAME) for model in models])
    return {
        "schema": SCHEMA,
        "reference": _reference_json(comparison.reference, text),
        "candidates": [
            {**_candidate_json(one, name, text), "thresholds": _limits_json(thresholds.thresholds_for(one.model))}
            for one, name in zip(comparison.candidates, names, strict=True)
        ],
        "methods": [_methods_json(row) for row in side_by_side(comparison.candidates)],
        "pairs": [_pair_json(pair) for pair in comparison.pairs],
        "passed": comparison.passed,
        "text": {
            "tokens": text.tokens,
            "window": text.window,
            "windows": text.windows,
            "scored_per_window": text.scored,
            "scored_positions": text.windows * text.scored,
        },
        "thresholds": _limits_json(thresholds),
        "kld_edges": list(EDGES),
        "environment": {str(key): str(value) for key, value in comparison.environment.items()},
        "bandwidth_bytes_per_s": _finite(comparison.bandwidth),
        "notes": list(comparison.notes),
    }


def _limits_json(limits: Thresholds) -> dict[str, Any]:
    return {field.name: getattr(limits, field.name) for field in dataclasses.fields(Thresholds)}


def model_json(model: Candidate, name: str) -> dict[str, Any]:
    """What a model is, under the `name` that reports call it."""
    return {
        "name": name,
        "path": str(model.path),
        "format": model.format,
        "scheme": model.scheme,
        "method": model.method,
        "runtime": model.runtime.NAME,
        "options": {str(key): _plain(value) for key, value in model.options.items()},
        "bytes": model.bytes,
        "bits_per_weight": _finite(model.bits_per_weight),
    }


def _plain(value: object) -> str | int | float | bool | None:
    if isinstance(value, float):
        return _finite(value)
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def _reference_json(reference: ReferenceResult, text: TextFacts) -> dict[str, Any]:
    floor = reference.floor
    return {
        **model_json(reference.model, reference_name(reference.model.path)),
        "perplexity": _finite(reference.perplexity.value),
        "perplexity_error": _finite(reference.perplexity.error),
        "noise_floor": None if floor is None else _accuracy_json(floor) | _distribution_json(floor, text),
        **_use_json(reference),
    }


def _candidate_json(result: CandidateResult, name: str, text: TextFacts) -> dict[str, Any]:
    return {
        **model_json(result.model, name),
        "fingerprint": result.fingerprint or None,
        **_accuracy_json(result.accuracy),
        **_distribution_json(result.accuracy, text),
        "attribution": _attribution_json(result.attribution),
        "tensor_errors": [_tensor_json(error) for error in result.tensor_errors],
        "calibration_errors": [dataclasses.asdict(step) for step in result.model.steps],
        "greedy": _greedy_json(result.greedy),
        **_use_json(result),
        "tokenizer_equal": result.tokenizer_equal,
        "chat": [dataclasses.asdict(check) for check in result.chat],
        "notes": list(result.notes),
        "missed": list(result.misses),
        "passed": result.passed,
    }


def _use_json(result: ReferenceResult | CandidateResult) -> dict[str, Any]:
    return {
        "speed": speed_json(result.speed),
        "bandwidth_share": _finite(result.bandwidth_share),
        "load_seconds": _finite(result.load_seconds),
        "peak_rss_bytes": result.peak_rss_bytes,
    }


def _accuracy_json(accuracy: Accuracy) -> dict[str, Any]:
    kld = accuracy.kld
    return {
        "kld": {
            "mean": _finite(kld.mean.value),
            "mean_error": _finite(kld.mean.error),
            "median": _finite(kld.median),
            "p90": _finite(kld.p90),
            "p95": _finite(kld.p95),
            "p99": _finite(kld.p99),
            "p99_9": _finite(kld.p999),
            "max": _finite(kld.maximum),
        },
        "top1_agreement": _finite(accuracy.top1.value),
        "top1_agreement_error": _finite(accuracy.top1.error),
        "top5_overlap": _finite(accuracy.top5),
        "perplexity": _finite(accuracy.candidate.value),
        "perplexity_error": _finite(accuracy.candidate.error),
        "perplexity_ratio": _finite(accuracy.ratio.value),
        "perplexity_ratio_error": _finite(accuracy.ratio.error),
        "ln_perplexity_ratio": _finite(accuracy.ln_ratio.value),
        "ln_perplexity_ratio_error": _finite(accuracy.ln_ratio.error),
        "delta_p": {
            "mean": _finite(accuracy.delta_p.value),
            "mean_error": _finite(accuracy.delta_p.error),
            "rms": _finite(accuracy.delta_p_rms.value),
            "rms_error": _finite(accuracy.delta_p_rms.error),
        },
    }


def _distribution_json(accuracy: Accuracy, text: TextFacts) -> dict[str, Any]:
    return {"kld_histogram": histogram(accuracy), "by_position": by_position(accuracy, text)}


def _attribution_json(attribution: Attribution | None) -> dict[str, Any] | None:
    if attribution is None:
        return None
    return {
        "quantization": _accuracy_json(attribution.quantization),
        "exporter": _accuracy_json(attribution.exporter),
    }


def _pair_json(pair: Pair) -> dict[str, Any]:
    return {"first": pair.first, "second": pair.second, **_accuracy_json(pair.accuracy)}


def _methods_json(row: Row) -> dict[str, Any]:
    return {
        "format": row.format,
        "scheme": row.scheme,
        "runtime": row.runtime,
        "bits_per_weight": _finite(row.bits_per_weight),
        "files": [
            {
                "method": cell.method,
                "candidate": cell.candidate,
                "kld": _finite(cell.kld.value),
                "kld_error": _finite(cell.kld.error),
                "ratio": _finite(cell.ratio),
            }
            for cell in row.cells
        ],
    }


def _tensor_json(error: TensorError) -> dict[str, Any]:
    return {
        "source": error.source,
        "layer": error.layer,
        "weights": error.weights,
        "relative": _finite(error.relative),
    }


def _greedy_json(greedy: Greedy | None) -> dict[str, Any] | None:
    if greedy is None:
        return None
    first = greedy.first
    agreed = [prompt.tokens if prompt.position is None else prompt.position for prompt in greedy.prompts]
    return {
        "tokens": greedy.tokens,
        "first_divergence": first.position if first else None,
        "margin": _finite(first.margin) if first else None,
        "mean_agreed_tokens": _finite(greedy.mean_agreed),
        "median_agreed_tokens": _finite(statistics.median(agreed)),
        "share_never_diverging": _finite(greedy.never),
        "near_ties": greedy.near_ties,
        "prompts": [_prompt_json(prompt) for prompt in greedy.prompts],
    }


def _prompt_json(prompt: Divergence) -> dict[str, Any]:
    return {
        "tokens": prompt.tokens,
        "first_divergence": prompt.position,
        "margin": _finite(prompt.margin),
        "reference_token": prompt.reference_token,
        "candidate_token": prompt.candidate_token,
        "before": prompt.before,
        "reference_text": prompt.reference_text,
        "candidate_text": prompt.candidate_text,
    }


def speed_json(speed: Speed | None) -> dict[str, Any] | None:
    """Milliseconds and tokens per second with their errors; None where speed was not measured."""
    if speed is None:
        return None
    figures: dict[str, Any] = {}
    for name in ("ttft_ms", "prefill_tok_s", "decode_tok_s"):
        estimate: Estimate = getattr(speed, name)
        figures |= {name: _finite(estimate.value), f"{name}_error": _finite(estimate.error)}
    return {
        **figures,
        "prompt_tokens": speed.prompt_tokens,
        "prefill_tokens": speed.prefill_tokens,
        "decode_tokens": speed.decode_tokens,
        "repetitions": speed.repetitions,
    }


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None

"""A comparison as JSON for machines and as tables for people.

Every figure of the tables stands in the JSON too.  The tables need 100 columns and are printed that wide even
where the console is narrower or no terminal: a figure is never cut off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from smolexport.parity.inputs import Candidate
from smolexport.parity.results import Accuracy, CandidateResult, Comparison, Estimate, Greedy, ReferenceResult, Speed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["model_json", "render", "speed_json", "to_json"]

_WIDTH = 100
_ABSENT = "-"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Plain JSON values only; figures that do not exist or are not finite are None."""
    text, thresholds = comparison.text, comparison.thresholds
    return {
        "reference": _reference_json(comparison.reference),
        "candidates": [_candidate_json(candidate) for candidate in comparison.candidates],
        "passed": comparison.passed,
        "text": {
            "tokens": text.tokens,
            "window": text.window,
            "windows": text.windows,
            "scored_positions": text.windows * text.scored,
        },
        "thresholds": {
            "max_kld": thresholds.max_kld,
            "min_top1": thresholds.min_top1,
            "max_ppl_ratio": thresholds.max_ppl_ratio,
        },
        "notes": list(comparison.notes),
    }


def render(comparison: Comparison, console: Console) -> None:
    """Print the tables, the notes and one verdict line per missed threshold."""
    width = max(_WIDTH, console.width)
    for table in (_accuracy_table(comparison), _speed_table(comparison)):
        if console.width < _WIDTH:
            table.width = width
        console.print(table, crop=False)
        console.print()
    for line in _lines(comparison):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def model_json(model: Candidate) -> dict[str, Any]:
    """What a model is."""
    return {
        "path": str(model.path),
        "format": model.format,
        "scheme": model.scheme,
        "runtime": model.runtime.NAME,
        "bytes": model.bytes,
        "bits_per_weight": _finite(model.bits_per_weight),
    }


def _reference_json(reference: ReferenceResult) -> dict[str, Any]:
    return {
        **model_json(reference.model),
        "perplexity": _finite(reference.perplexity.value),
        "perplexity_error": _finite(reference.perplexity.error),
        "speed": speed_json(reference.speed),
        "load_seconds": _finite(reference.load_seconds),
        "peak_rss_bytes": reference.peak_rss_bytes,
    }


def _candidate_json(result: CandidateResult) -> dict[str, Any]:
    return {
        **model_json(result.model),
        **_accuracy_json(result.accuracy),
        "greedy": _greedy_json(result.greedy),
        "speed": speed_json(result.speed),
        "load_seconds": _finite(result.load_seconds),
        "peak_rss_bytes": result.peak_rss_bytes,
        "tokenizer_equal": result.tokenizer_equal,
        "notes": list(result.notes),
        "missed": list(result.misses),
        "passed": result.passed,
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


def _greedy_json(greedy: Greedy | None) -> dict[str, Any] | None:
    if greedy is None:
        return None
    first = greedy.first
    return {
        "tokens": greedy.tokens,
        "first_divergence": first.position if first else None,
        "margin": _finite(first.margin) if first else None,
        "mean_agreed_tokens": _finite(greedy.mean_agreed),
        "share_never_diverging": _finite(greedy.never),
        "prompts": [
            {
                "tokens": prompt.tokens,
                "first_divergence": prompt.position,
                "margin": _finite(prompt.margin),
                "reference_token": prompt.reference_token,
                "candidate_token": prompt.candidate_token,
            }
            for prompt in greedy.prompts
        ],
    }


def speed_json(speed: Speed | None) -> dict[str, Any] | None:
    """Tokens per second and milliseconds; None where speed was not measured."""
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


def _accuracy_table(comparison: Comparison) -> Table:
    text = comparison.text
    table = _table(
        f"Accuracy over {text.windows * text.scored:,} positions",
        ["KLD mean\nnats/tok", "median", "99 %", "max", "top-1\n%", "PPL", "PPL\nratio", "first greedy\ndivergence"],
    )
    reference = comparison.reference
    own = _cell(reference.perplexity, "{:.4g}")
    table.add_row(_label(reference.model, comparison), *[_ABSENT] * 5, own, _ABSENT, _ABSENT)
    for result in comparison.candidates:
        accuracy = result.accuracy
        table.add_row(
            _label(result.model, comparison),
            _cell(accuracy.kld.mean, "{:.3g}"),
            *(_number(value, "{:.3g}") for value in (accuracy.kld.median, accuracy.kld.p99, accuracy.kld.maximum)),
            _cell(Estimate(100 * accuracy.top1.value, 100 * accuracy.top1.error), "{:.2f}"),
            _cell(accuracy.candidate, "{:.4g}"),
            _cell(accuracy.ratio, "{:.4f}" if accuracy.ratio.value < 100 else "{:.3g}"),
            _divergence(result.greedy),
        )
    return table


def _speed_table(comparison: Comparison) -> Table:
    reference = comparison.reference
    speed = reference.speed
    lengths = f" ({speed.prefill_tokens} and {speed.decode_tokens} tokens)" if speed else ""
    table = _table(
        f"Size and speed{lengths}",
        [
            "size\nMB",
            "bits per\nweight",
            "load\ns",
            "first token\nms",
            "prefill\ntok/s",
            "decode\ntok/s",
            "peak RSS\nMB",
        ],
    )
    rows: list[ReferenceResult | CandidateResult] = [reference, *comparison.candidates]
    for result in rows:
        speed = result.speed
        rates = (speed.ttft_ms, speed.prefill_tok_s, speed.decode_tok_s) if speed else (None, None, None)
        table.add_row(
            _label(result.model, comparison),
            _number(result.model.bytes / 1e6, "{:,.1f}"),
            _number(result.model.bits_per_weight, "{:.2f}"),
            _number(result.load_seconds, "{:.2f}"),
            *(_rate(rate) for rate in rates),
            _number(None if result.peak_rss_bytes is None else result.peak_rss_bytes / 1e6, "{:,.0f}"),
        )
    return table


def _table(title: str, columns: Iterable[str]) -> Table:
    from rich.table import Table

    # no lines, two spaces between columns: the width of 100 is for figures
    table = Table(title=title, box=None, padding=(0, 2, 1, 0), pad_edge=False, title_justify="left", title_style="bold")
    table.add_column("file", overflow="fold", header_style="bold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True, header_style="bold")
    return table


def _label(model: Candidate, comparison: Comparison) -> str:
    """Name and kind; two files of one name are told apart by their folders."""
    from rich.markup import escape

    reference = model is comparison.reference.model
    names = [result.model.path.name for result in comparison.candidates]
    twins = not reference and names.count(model.path.name) > 1
    name = f"{model.path.absolute().parent.name}/{model.path.name}" if twins else model.path.name
    kind = "reference" if reference else model.format
    return f"{escape(name)}\n[dim]{escape(f'{kind} {model.scheme}, {model.runtime.NAME}')}[/dim]"


def _number(value: float | None, form: str) -> str:
    return _ABSENT if value is None else form.format(value)


def _rate(estimate: Estimate | None) -> str:
    """Three digits or all before the point; more would be noise."""
    return _cell(estimate, "{:,.0f}" if estimate and estimate.value >= 100 else "{:.3g}")


def _cell(estimate: Estimate | None, form: str) -> str:
    """A value with its error below it."""
    if estimate is None:
        return _ABSENT
    if not math.isfinite(estimate.error):
        return form.format(estimate.value)
    return f"{form.format(estimate.value)}\n[dim]±{_error(estimate.error)}[/dim]"


def _error(error: float) -> str:
    """Two significant digits, or all before the point."""
    return f"{error:,.0f}" if error >= 10 or error == 0 else f"{error:.2g}"


def _divergence(greedy: Greedy | None) -> str:
    """The earliest and the mean first difference; below it, how near a tie the reference was at the earliest."""
    if greedy is None:
        return _ABSENT
    first = greedy.first
    if first is None:
        return f"none\n[dim]in {len(greedy.prompts)} x {greedy.tokens}[/dim]"
    return f"{first.position}, mean {greedy.mean_agreed:.1f}\n[dim]margin {_number(first.margin, '{:.2g}')}[/dim]"


def _lines(comparison: Comparison) -> Iterable[str]:
    """Notes and verdicts."""
    text, thresholds = comparison.text, comparison.thresholds
    yield (
        f"{text.tokens:,} tokens of text, {text.windows} windows of {text.window}, "
        f"the last {text.scored} predictions of each scored"
    )
    greedy = comparison.candidates[0].greedy
    if greedy:
        yield (
            f"first greedy divergence: index of the first other token, earliest and mean of {len(greedy.prompts)} "
            f"prompts ({greedy.tokens} where none differs)"
        )
        yield "margin: gap between the reference's two largest logits at the earliest one; near 0 it was a tie"
    yield from (f"note: {note}" for note in comparison.notes)
    for result in comparison.candidates:
        yield from (f"note: {result.model.path.name}: {note}" for note in result.notes)
        yield from (f"MISSED: {result.model.path.name}: {miss}" for miss in result.misses)
    asked = thresholds.max_kld is not None or thresholds.min_top1 is not None or thresholds.max_ppl_ratio is not None
    if asked and comparison.passed:
        yield "PASSED: every file is within the thresholds"

"""A comparison as Markdown, for a model card."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from smolexport.parity.method_table import PLAIN, columns
from smolexport.parity.report.names import ABSENT, described, figure, number, percent, rate
from smolexport.parity.results import Accuracy, Attribution, Comparison, Greedy, MethodFile
from smolexport.parity.thresholds import Thresholds
from smolexport.text import printable

FLAGS = "max_kld", "min_top1", "max_ppl_ratio"  # thresholds with an option of `compare`


def render_markdown(comparison: Comparison) -> str:
    """Tables in GitHub's Markdown: accuracy, methods, pairs, speed; then missed thresholds and the conditions."""
    parts = [make(comparison) for make in (_accuracy, _methods, _pairs, _speed, _verdicts, _conditions)]
    return "\n\n".join(filter(None, parts)) + "\n"


def command_line(comparison: Comparison) -> str:
    """The command that reproduces the figures: names instead of paths, without options that change no figure."""
    reference, text = comparison.reference.model, comparison.text
    # a file on several runtimes is named once
    files = dict.fromkeys(
        str(result.model.path).replace("\\", "/").rpartition("/")[2] for result in comparison.candidates
    )
    words = ["smolexport", "compare", reference.name, *files, "--dtype", reference.scheme]
    words += ["--window", str(text.window)]
    words += ["--max-windows", str(text.windows)] if text.windows < text.tokens // text.window else []
    words += _threshold_options([result.thresholds for result in comparison.candidates])
    return shlex.join(printable(word) for word in words)


def _threshold_options(limits: Sequence[Thresholds]) -> list[str]:
    """Options for thresholds that all files share; `--gate` if some have no option or differ between files."""
    values = limits[0].values()
    if any(other != limits[0] for other in limits) or values.keys() - set(FLAGS):
        return ["--gate", "parity.toml"]
    return [word for name, limit in values.items() for word in (f"--{name.replace('_', '-')}", f"{limit:g}")]


def _accuracy(comparison: Comparison) -> str:
    reference, floor = comparison.reference, comparison.reference.noise_floor
    parts = any(result.attribution for result in comparison.candidates)
    head = ["file", "format", "KLD, nats/token", "KLD 99 %", "top-1, %", "perplexity ratio", "greedy tokens agreed"]
    head += ["KLD by quantization", "KLD by exporter"] if parts else []
    rows = []
    if floor:
        kind = f"f32 against {_text(reference.model.scheme)}"
        rows.append(["*noise floor*", kind, *_figures(floor), ABSENT, *[ABSENT] * (2 * parts)])
    for result in comparison.candidates:
        row = [_code(result.model.name), _text(described(result.model)), *_figures(result.accuracy)]
        rows.append([*row, _greedy(result.greedy), *(_parts(result.attribution) if parts else [])])
    title = (
        f"Accuracy against {_code(reference.model.name)} in {_text(reference.model.scheme)} "
        f"(perplexity {reference.perplexity.value:.4g}), {comparison.text.scored_positions:,} positions:"
    )
    return f"{title}\n\n{_table(head, rows, left=2)}"


def _figures(accuracy: Accuracy) -> list[str]:
    return [
        _cell(figure(accuracy.kld.mean, "{:.3g}")),
        f"{accuracy.kld.p99:.3g}",
        _cell(percent(accuracy.top1_agreement)),
        _cell(figure(accuracy.perplexity_ratio, "{:.4f}")),
    ]


def _cell(shown: tuple[str, str]) -> str:
    return " ± ".join(filter(None, shown))


def _greedy(greedy: Greedy | None) -> str:
    return ABSENT if greedy is None else f"{greedy.median_agreed_tokens:g} of {greedy.tokens}"


def _parts(attribution: Attribution | None) -> list[str]:
    if attribution is None:
        return [ABSENT] * 2
    return [_cell(figure(part.kld.mean, "{:.3g}")) for part in (attribution.quantization, attribution.exporter)]


def _methods(comparison: Comparison) -> str:
    if not comparison.methods:
        return ""
    methods = columns(file.method for row in comparison.methods for file in row.files)
    rows = []
    for row in comparison.methods:
        cells = {file.method: _method(file) for file in row.files}
        kind = _text(f"{row.format} {row.scheme}, {row.runtime}")
        rows.append([kind, *(cells.get(method, ABSENT) for method in methods)])
    title = f"KLD, nats/token, of calibration methods at equal size (ratio to {PLAIN}, plain rounding):"
    return f"{title}\n\n{_table(['format', *map(_text, methods)], rows, left=1)}"


def _method(file: MethodFile) -> str:
    kld = _cell(figure(file.kld, "{:.3g}"))
    return kld if file.method == PLAIN or file.ratio is None else f"{kld} ({file.ratio:.2f})"


def _pairs(comparison: Comparison) -> str:
    if not comparison.pairs:
        return ""
    names = [_code(result.model.name) for result in comparison.candidates]
    rows = [[names[pair.first], names[pair.second], *_figures(pair.accuracy)[:3]] for pair in comparison.pairs]
    head = ["same weights", "on another runtime", "KLD, nats/token", "KLD 99 %", "top-1, %"]
    return f"Files with the same weights, compared with each other:\n\n{_table(head, rows, left=2)}"


def _speed(comparison: Comparison) -> str:
    results = (comparison.reference, *comparison.candidates)
    speeds = [result.speed for result in results if result.speed]
    head = ["file", "size, MB", "bits per weight"]
    lengths = ""
    if speeds:
        head += ["first token, ms", "prefill, tok/s", "decode, tok/s"]
        lengths = f" (prefill of {speeds[0].prefill_tokens} tokens, decode of {speeds[0].decode_tokens})"
    shares = comparison.bandwidth_bytes_per_s is not None
    head += (["of memory bandwidth"] if shares else []) + ["peak memory, MB"]
    rows = []
    for result in results:
        model, speed, peak = result.model, result.speed, result.peak_rss_bytes
        row = [_code(model.name), f"{model.bytes / 1e6:,.1f}", f"{model.bits_per_weight:.2f}"]
        if speeds:
            rates = (speed.ttft_ms, speed.prefill_tok_s, speed.decode_tok_s) if speed else [None] * 3
            row += [_cell(rate(one)) for one in rates]
        row += [number(result.bandwidth_share, "{:.0%}")] if shares else []
        rows.append([*row, number(None if peak is None else peak / 1e6, "{:,.0f}")])
    return f"Size and speed{lengths}:\n\n{_table(head, rows, left=1)}"


def _verdicts(comparison: Comparison) -> str:
    results = comparison.candidates
    lines = [f"- missed: {_code(result.model.name)}: {_text(miss)}" for result in results for miss in result.missed]
    if not lines and any(result.thresholds.values() for result in results):
        lines = ["- passed: every file meets its thresholds"]
    return "\n".join(lines)


def _conditions(comparison: Comparison) -> str:
    text = comparison.text
    lines = [
        f"Measured with {_code(command_line(comparison))} on {text.tokens:,} tokens of text: {text.windows} windows "
        f"of {text.window} tokens, the last {text.scored_per_window} predictions of each scored. "
        "KLD is the divergence of the predictions, 0 if they are equal; "
        "± is one standard error; agreed tokens are the median over the prompts."
    ]
    if comparison.environment:
        lines.append("; ".join(f"{_text(key)}: {_text(value)}" for key, value in comparison.environment.items()) + ".")
    notes = [*comparison.notes, *(f"{one.model.name}: {note}" for one in comparison.candidates for note in one.notes)]
    lines += ["\n".join(f"- {_text(note)}" for note in notes)] if notes else []
    return "\n\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    """A table whose columns after the first `left` are right-aligned."""
    lines = [head, [":--" if place < left else "--:" for place in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(name: str) -> str:
    """`name` as code, or escaped if it holds characters that would end the code or the cell."""
    name = printable(name)
    return _text(name) if not name.strip() or "`" in name or "|" in name else f"`{name}`"


def _text(words: str) -> str:
    """Untrusted text, escaped so that nothing in it is Markdown or HTML."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", printable(words))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", ":&#47;/")

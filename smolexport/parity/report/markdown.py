"""A comparison as Markdown, to be pasted into a model card."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from smolexport.parity.methods import PLAIN, columns
from smolexport.parity.report.names import ABSENT, estimate, number
from smolexport.parity.report.sheet import to_json
from smolexport.parity.results import Comparison
from smolexport.text import printable

__all__ = ["command_line", "render_markdown"]

Sheet = Mapping[str, Any]
FLAGS = "max_kld", "min_top1", "max_ppl_ratio"  # thresholds that `compare` takes on its command line


def render_markdown(comparison: Comparison) -> str:
    """The sheet as Markdown with GitHub's tables: accuracy, speed, what was missed, how it was measured."""
    sheet = to_json(comparison)
    parts = [
        _accuracy(sheet),
        _methods(sheet),
        _pairs(sheet),
        _speed(sheet),
        _verdicts(sheet),
        _measured(sheet),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def command_line(sheet: Sheet) -> str:
    """The essentials of the command that gave `sheet`: names instead of paths, no option that changes no figure."""
    reference, text = sheet["reference"], sheet["text"]
    # a file that is played twice is named once
    files = dict.fromkeys(candidate["path"].replace("\\", "/").rpartition("/")[2] for candidate in sheet["candidates"])
    words = ["smolexport", "compare", reference["name"], *files, "--dtype", reference["scheme"]]
    words += ["--window", str(text["window"])]
    words += ["--max-windows", str(text["windows"])] if text["windows"] < text["tokens"] // text["window"] else []
    words += _asking([candidate["thresholds"] for candidate in sheet["candidates"]])
    return shlex.join(printable(word) for word in words)


def _asking(limits: Sequence[Sheet]) -> list[str]:
    """Flags for what was asked of all files; a gate where some flag does not exist, or files differ."""
    asked = {name: limit for name, limit in limits[0].items() if limit is not None}
    if any(other != limits[0] for other in limits) or asked.keys() - set(FLAGS):
        return ["--gate", "parity.toml"]
    return [word for name, limit in asked.items() for word in (f"--{name.replace('_', '-')}", f"{limit:g}")]


def _accuracy(sheet: Sheet) -> str:
    text, reference, floor = sheet["text"], sheet["reference"], sheet["reference"]["noise_floor"]
    parts = any(candidate["attribution"] for candidate in sheet["candidates"])
    head = ["file", "format", "KLD, nats/token", "KLD 99 %", "top-1, %", "perplexity ratio", "greedy tokens agreed"]
    head += ["KLD by quantization", "KLD by exporter"] if parts else []
    rows = []
    if floor:
        kind = f"f32 against {_text(reference['scheme'])}"
        rows.append(["*noise floor*", kind, *_figures(floor), ABSENT, *[ABSENT] * (2 * parts)])
    for candidate in sheet["candidates"]:
        row = [_code(candidate["name"]), _kind(candidate), *_figures(candidate), _greedy(candidate["greedy"])]
        rows.append([*row, *(_parts(candidate["attribution"]) if parts else [])])
    title = (
        f"Accuracy against {_code(reference['name'])} in {_text(reference['scheme'])} "
        f"(perplexity {number(reference['perplexity'], '{:.4g}')}), {text['scored_positions']:,} positions:"
    )
    return f"{title}\n\n{_table(head, rows, left=2)}"


def _figures(accuracy: Sheet) -> list[str]:
    kld, top1, error = accuracy["kld"], accuracy["top1_agreement"], accuracy["top1_agreement_error"]
    return [
        estimate(kld["mean"], kld["mean_error"], "{:.3g}"),
        number(kld["p99"], "{:.3g}"),
        estimate(None if top1 is None else 100 * top1, None if error is None else 100 * error, "{:.2f}"),
        estimate(accuracy["perplexity_ratio"], accuracy["perplexity_ratio_error"], "{:.4f}"),
    ]


def _greedy(greedy: Sheet | None) -> str:
    return ABSENT if greedy is None else f"{greedy['median_agreed_tokens']:g} of {greedy['tokens']}"


def _parts(attribution: Sheet | None) -> list[str]:
    if attribution is None:
        return [ABSENT] * 2
    both = (attribution[part]["kld"] for part in ("quantization", "exporter"))
    return [estimate(kld["mean"], kld["mean_error"], "{:.3g}") for kld in both]


def _methods(sheet: Sheet) -> str:
    if not sheet["methods"]:
        return ""
    methods = columns(file["method"] for row in sheet["methods"] for file in row["files"])
    rows = []
    for row in sheet["methods"]:
        cells = {file["method"]: _method(file) for file in row["files"]}
        kind = _text(f"{row['format']} {row['scheme']}, {row['runtime']}")
        rows.append([kind, *(cells.get(method, ABSENT) for method in methods)])
    title = f"KLD, nats/token, of methods side by side at equal bytes (ratio to {PLAIN}, plain rounding):"
    return f"{title}\n\n{_table(['format', *map(_text, methods)], rows, left=1)}"


def _method(file: Sheet) -> str:
    kld = estimate(file["kld"], file["kld_error"], "{:.3g}")
    return kld if file["method"] == PLAIN or file["ratio"] is None else f"{kld} ({file['ratio']:.2f})"


def _pairs(sheet: Sheet) -> str:
    if not sheet["pairs"]:
        return ""
    rows = []
    for pair in sheet["pairs"]:
        both = [_code(sheet["candidates"][pair[place]]["name"]) for place in ("first", "second")]
        rows.append([*both, *_figures(pair)[:3]])
    head = ["same weights", "on another player", "KLD, nats/token", "KLD 99 %", "top-1, %"]
    return f"Files that hold the same weights, against each other:\n\n{_table(head, rows, left=2)}"


def _speed(sheet: Sheet) -> str:
    speeds = [row["speed"] for row in (sheet["reference"], *sheet["candidates"]) if row["speed"]]
    head = ["file", "size, MB", "bits per weight"]
    lengths = ""
    if speeds:
        head += ["first token, ms", "prefill, tok/s", "decode, tok/s"]
        lengths = f" ({speeds[0]['prefill_tokens']} tokens at once, {speeds[0]['decode_tokens']} one by one)"
    shares = sheet["bandwidth_bytes_per_s"] is not None
    head += (["of memory bandwidth"] if shares else []) + ["peak memory, MB"]
    rows = []
    for model in (sheet["reference"], *sheet["candidates"]):
        speed, peak = model["speed"], model["peak_rss_bytes"]
        row = [_code(model["name"]), f"{model['bytes'] / 1e6:,.1f}", number(model["bits_per_weight"], "{:.2f}")]
        for name in ("ttft_ms", "prefill_tok_s", "decode_tok_s") if speeds else ():
            row.append(_rate(speed[name], speed[f"{name}_error"]) if speed else ABSENT)
        row += [number(model["bandwidth_share"], "{:.0%}")] if shares else []
        rows.append([*row, number(None if peak is None else peak / 1e6, "{:,.0f}")])
    return f"Size and speed{lengths}:\n\n{_table(head, rows, left=1)}"


def _rate(value: float | None, error: float | None) -> str:
    return estimate(value, error, "{:,.0f}" if value is not None and value >= 100 else "{:.3g}")


def _verdicts(sheet: Sheet) -> str:
    lines = [
        f"- missed: {_code(candidate['name'])}: {_text(miss)}"
        for candidate in sheet["candidates"]
        for miss in candidate["missed"]
    ]
    asked = [limit for candidate in sheet["candidates"] for limit in candidate["thresholds"].values()]
    if not lines and any(limit is not None for limit in asked):
        lines = ["- passed: every file is within the thresholds"]
    return "\n".join(lines)


def _measured(sheet: Sheet) -> str:
    text = sheet["text"]
    lines = [
        f"Measured with {_code(command_line(sheet))} on {text['tokens']:,} tokens of text: {text['windows']} windows "
        f"of {text['window']}, the last {text['scored_per_window']} predictions of each scored. "
        "KLD is the divergence of the predictions, 0 where they are equal; "
        "± is one standard error; agreed tokens are the median over the prompts."
    ]
    if sheet["environment"]:
        lines.append("; ".join(f"{_text(key)}: {_text(value)}" for key, value in sheet["environment"].items()) + ".")
    notes = list(sheet["notes"])
    for candidate in sheet["candidates"]:
        notes += [f"{candidate['name']}: {note}" for note in candidate["notes"]]
    lines += ["\n".join(f"- {_text(note)}" for note in notes)] if notes else []
    return "\n\n".join(lines)


def _kind(model: Sheet) -> str:
    method = f" {model['method']}" if model["method"] else ""
    return _text(f"{model['format']} {model['scheme']}{method}, {model['runtime']}")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    """Columns after the first `left` are figures and stand at the right."""
    lines = [head, [":--" if place < left else "--:" for place in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(name: str) -> str:
    """`name` as code, or escaped where it holds what would end the code or the cell."""
    name = printable(name)
    return _text(name) if not name.strip() or "`" in name or "|" in name else f"`{name}`"


def _text(words: str) -> str:
    """Plain words: nothing in them is Markdown or HTML, whoever wrote them."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", printable(words))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", ":&#47;/")

"""`smolexport inspect`: what an exported file holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolexport.cli import options
from smolexport.cli.streams import print_json, progress_bar, say
from smolexport.errors import FileFormatError
from smolexport.text import label, one_line, printable, show

if TYPE_CHECKING:
    from smolexport.conversion.converter import Converter
    from smolexport.conversion.inspect import FileInfo

MAX_DEPTH = 16  # of lists and objects in metadata; a config.json has three or four


@click.command("inspect", short_help="Show what an exported file holds.")
@click.argument("file", type=options.given_path, help="An exported file or folder.")
@click.option("--tensors/--no-tensors", default=True, help="List every tensor.")
@click.option("--fingerprint/--no-fingerprint", default=True, help="Decode and hash all weights.")
@options.threads
@options.json
def command(file: Path, tensors: bool, fingerprint: bool, threads: int | None, json: bool) -> None:
    """Show metadata, tensors, their formats, the bits per weight and the weights fingerprint of an exported file.

    Two files have the same fingerprint exactly when all their decoded weights are equal, whatever their formats.
    --no-fingerprint reads the header only. A note tells what a reader of the format would refuse or misread.
    """
    from smolexport.plugins import converter_for

    module = converter_for(file)
    found = module.describe(file)
    findings = _findings(module, file)
    mark = _fingerprint(module, found, threads) if fingerprint else None
    if json:
        facts = _as_json(found, tensors) | {"findings": findings}
        print_json(facts | ({"fingerprint": mark} if fingerprint else {}))
    else:
        click.echo(_as_text(found, tensors, mark))


def _findings(module: Converter, file: Path) -> list[str]:
    """What the format's own check finds, each also as a note; an error of the check is a finding, too."""
    try:
        findings = module.lint(file)
    except FileFormatError as error:
        findings = [str(error)]
    for line in findings:
        say(f"note: {one_line(line)}")
    return findings


def _fingerprint(module: Converter, found: FileInfo, threads: int | None) -> str | None:
    """None, and a note, for a file whose tensors are not those of a known architecture."""
    from smolexport.model.weights import fingerprint
    from smolexport.processes import thread_count

    try:
        weights = module.weights(found.path)
    except FileFormatError as error:
        say(f"note: no weights fingerprint: {error}")
        return None
    total = sum(tensor.size for tensor in weights)
    with progress_bar("weights fingerprint", total, unit="weights") as advance:
        return fingerprint(weights, thread_count(threads), advance)


def _as_json(d: FileInfo, tensors: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "path": str(d.path),
        **{key: getattr(d, key) for key in ("format", "architecture", "name", "scheme", "bytes", "weights")},
        "bits_per_weight": round(d.bits_per_weight, 4),
        "formats": _shares(d),
        "metadata": {k: _plain(v) for k, v in d.metadata.items()},
    }
    if tensors:
        facts["tensors"] = [
            {"name": t.name, "shape": list(t.shape), "format": t.format, "bytes": t.nbytes, "offset": t.offset}
            for t in d.tensors
        ]
    return facts


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` as JSON can hold it: lists for arrays, text for NaN and infinity, "..." beyond the maximal depth."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, dict)) and depth == MAX_DEPTH:
        return "..."
    if isinstance(value, list):
        return [_plain(v, depth + 1) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v, depth + 1) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shares(d: FileInfo) -> dict[str, dict[str, int]]:
    rows: dict[str, dict[str, int]] = {}
    for t in d.tensors:
        row = rows.setdefault(t.format, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += t.nbytes
    return dict(sorted(rows.items(), key=lambda item: -item[1]["bytes"]))


def _as_text(d: FileInfo, tensors: bool, mark: str | None) -> str:
    lines = [
        f"{d.path}: {d.format} {label(d.scheme)}, {label(d.architecture)}, '{label(d.name)}'",
        f"{d.bytes:,} bytes, {d.weights:,} weights, {d.bits_per_weight:.2f} bits per weight",
        *([f"weights fingerprint {mark}"] if mark else []),
    ]
    wide = max((6, *(len(t.format) for t in d.tensors)))
    lines += [
        f"  {name:<{wide}} {row['tensors']:>4} tensors {row['bytes']:>14,} bytes" for name, row in _shares(d).items()
    ]
    lines += ["", "metadata", *(f"  {label(key):<48} {_short(value)}" for key, value in d.metadata.items())]
    if tensors:
        lines += ["", "tensors"]
        names = [label(t.name) for t in d.tensors]
        long = max((28, *map(len, names)))
        lines += [
            f"  {name:<{long}} {' x '.join(map(str, t.shape)):>16}  {t.format:<{wide}} {t.nbytes:>12,} bytes"
            for name, t in zip(names, d.tensors, strict=True)
        ]
    return "\n".join(map(printable, lines))


def _short(value: Any) -> str:
    if isinstance(value, str):
        return show(value) if len(value) <= 60 else f"{show(value, 60)} ({len(value)} characters)"
    if isinstance(value, list) or hasattr(value, "tolist"):
        head = ", ".join(show(_plain(v)) for v in value[:4])
        return f"[{head}{', ...' if len(value) > 4 else ''}] ({len(value)} values)"
    if isinstance(value, dict):
        return f"{show(_plain(value), 120)} ({len(value)} keys)"
    return f"{value:.9g}" if isinstance(value, float) else show(value)

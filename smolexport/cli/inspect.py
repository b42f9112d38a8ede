"""`smolexport inspect`: what an exported file holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smolexport.cli.options import Json, print_json

if TYPE_CHECKING:
    from smolexport.description import Description

__all__ = ["command"]


def command(
    file: Annotated[Path, typer.Argument(help="An exported file or folder.")],
    tensors: Annotated[bool, typer.Option("--tensors/--no-tensors", help="List every tensor.")] = True,
    json: Json = False,
) -> None:
    """Show metadata, tensors, their formats and the bits per weight of an exported file.

    Reads the header only.
    """
    from smolexport.plugins import converter_for

    found = converter_for(file).describe(file)
    if json:
        print_json(_as_json(found, tensors))
    else:
        typer.echo(_as_text(found, tensors))


def _as_json(d: Description, tensors: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "path": str(d.path),
        "format": d.format,
        "architecture": d.architecture,
        "name": d.name,
        "scheme": d.scheme,
        "bytes": d.bytes,
        "weights": d.weights,
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


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: lists for arrays, text for what is no number."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shares(d: Description) -> dict[str, dict[str, int]]:
    rows: dict[str, dict[str, int]] = {}
    for t in d.tensors:
        row = rows.setdefault(t.format, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += t.nbytes
    return dict(sorted(rows.items(), key=lambda item: -item[1]["bytes"]))


def _as_text(d: Description, tensors: bool) -> str:
    lines = [
        f"{d.path}: {d.format} {d.scheme}, {d.architecture}, '{d.name}'",
        f"{d.bytes:,} bytes, {d.weights:,} weights, {d.bits_per_weight:.2f} bits per weight",
    ]
    lines += [f"  {name:<6} {row['tensors']:>4} tensors {row['bytes']:>14,} bytes" for name, row in _shares(d).items()]
    lines += ["", "metadata", *(f"  {key:<48} {_short(value)}" for key, value in d.metadata.items())]
    if tensors:
        lines += ["", "tensors"]
        lines += [
            f"  {t.name:<28} {' x '.join(map(str, t.shape)):>16}  {t.format:<6} {t.nbytes:>12,} bytes"
            for t in d.tensors
        ]
    # Names may come from a stranger's file: no control characters for the terminal.
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _short(value: Any) -> str:
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:57]!r}... ({len(value)} characters)"
    if isinstance(value, list) or hasattr(value, "tolist"):
        head = ", ".join(repr(_plain(v)) for v in value[:4])
        return f"[{head}{', ...' if len(value) > 4 else ''}] ({len(value)} values)"
    return f"{value:.9g}" if isinstance(value, float) else str(value)

"""`smolexport list`: formats, schemes, architectures and runtimes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from smolexport.cli.options import Json, print_json

__all__ = ["command"]


def command(
    format: Annotated[str | None, typer.Argument(help="Only the schemes of this format.")] = None,  # noqa: A002
    json: Json = False,
) -> None:
    """List formats with their quantization schemes, architectures, and runtimes with what they still need."""
    facts = _facts(format)
    if json:
        print_json(facts)
        return
    for name, schemes in facts["formats"].items():
        typer.echo(f"{name}: schemes for `smolexport {name} CHECKPOINT --quant SCHEME`")
        for scheme, about in schemes.items():
            typer.echo(f"  {scheme:<9} {about}")
        for option, about in facts["options"][name].items():
            typer.echo(f"  --set {option}=...  {about}")
    if format is None:
        typer.echo(f"architectures: {', '.join(facts['architectures'])}")
        typer.echo("runtimes:")
        width = max(10, *map(len, facts["runtimes"]))
        for name, state in facts["runtimes"].items():
            typer.echo(
                f"  {name:<{width}} {state['name']:<{width}} plays {state['reads']:<10} {state['missing'] or 'ready'}"
            )


def _facts(only: str | None) -> dict[str, Any]:
    from smolexport import plugins
    from smolexport.arch import architectures

    names = plugins.converters() if only is None else [only]
    formats = {}
    for name in names:
        module = plugins.converter(name)
        mark = {module.find_scheme(module.DEFAULT).name: " (default)"}
        formats[name] = {s.name: s.about + mark.get(s.name, "") for s in module.SCHEMES.values()}
    options = {name: dict(plugins.converter(name).OPTIONS) for name in names}
    facts: dict[str, Any] = {"formats": formats, "options": options}
    if only is None:
        facts["architectures"] = architectures()
        facts["runtimes"] = {
            name: {"name": a.NAME, "reads": a.READS, "missing": plugins.missing(name)}
            for name, a in ((n, plugins.adapter(n)) for n in plugins.runtimes())
        }
    return facts

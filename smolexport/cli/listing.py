"""`smolexport list`: formats, schemes, architectures and runtimes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import click

from smolexport.cli import options
from smolexport.cli.streams import print_json
from smolexport.errors import UsageError


@click.command("list", short_help="List schemes, architectures and runtimes.")
@click.argument("format", required=False, help="Only the schemes of this format.")
@options.json
def command(format: str | None, json: bool) -> None:  # noqa: A002
    """List formats with their quantization schemes, architectures, and runtimes with what they lack."""
    facts = _facts(format)
    if json:
        print_json(facts)
        return
    for name, schemes in facts["formats"].items():
        click.echo(f"{name}: schemes for `smolexport {name} CHECKPOINT --quant SCHEME`")
        wide = max(9, *map(len, schemes))
        for scheme, about in schemes.items():
            click.echo(f"  {scheme:<{wide}} {about}")
        for option, about in facts["options"][name].items():
            click.echo(f"  --set {option}=...  {about}")
    if format is None:
        click.echo(f"architectures: {', '.join(facts['architectures'])}")
        click.echo("runtimes:")
        width = max(10, *map(len, facts["runtimes"]))
        for name, state in facts["runtimes"].items():
            click.echo(
                f"  {name:<{width}} {state['name']:<{width}} runs {state['reads']:<10} {state['missing'] or 'ready'}"
            )


def _facts(only: str | None) -> dict[str, Any]:
    from smolexport import plugins
    from smolexport.model.arch import architectures

    names = plugins.converters() if only is None else [only]
    formats, settings = {}, {}
    for name in names:
        module = plugins.converter(name)
        settings[name] = dict(module.OPTIONS)
        marks = {"default": module.find_scheme(module.DEFAULT).name}
        with suppress(UsageError):  # not every format has a 4-bit scheme
            marks["best4"] = module.find_scheme("best4").name
        formats[name] = {
            s.name: s.about + "".join(f" ({word})" for word, scheme in marks.items() if scheme == s.name)
            for s in module.SCHEMES.values()
        }
    facts: dict[str, Any] = {"formats": formats, "options": settings}
    if only is None:
        facts["architectures"] = architectures()
        facts["runtimes"] = {
            name: {"name": a.NAME, "reads": a.READS, "missing": plugins.missing(name)}
            for name, a in ((n, plugins.adapter(n)) for n in plugins.runtimes())
        }
    return facts

"""The commands put together; one export command per installed converter."""

from __future__ import annotations

from typing import Any

import typer

from smolexport.cli import compare, demo, every, export, generate, inspect, listing
from smolexport.plugins import converters

__all__ = ["build"]

HELP = """Small language models out of Python: a Hugging Face checkpoint becomes a quantized file, and every file is
held against the bf16 original.

\b
smolexport gguf HuggingFaceTB/SmolLM2-135M-Instruct --quant q8_0
smolexport mlx HuggingFaceTB/SmolLM2-135M-Instruct --quant q4
smolexport onnx HuggingFaceTB/SmolLM2-135M-Instruct --quant int4
smolexport all HuggingFaceTB/SmolLM2-135M-Instruct --quant int4 -o out
smolexport compare HuggingFaceTB/SmolLM2-135M-Instruct out/*
smolexport demo
"""


def build() -> Any:
    """The click command behind `smolexport`."""
    app = typer.Typer(help=HELP, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_root)
    for name in converters():
        app.command(name, help=export.help_of(name), short_help=f"Export a checkpoint to {name.upper()}.")(
            export.command_for(name)
        )
    app.command("all", short_help="Export a checkpoint to every format in one pass.")(every.command)
    app.command("compare", short_help="Hold exported files against their checkpoint.")(compare.command)
    app.command("generate", short_help="Continue a text with a file or a checkpoint.")(generate.command)
    app.command("inspect", short_help="Show what an exported file holds.")(inspect.command)
    app.command("list", short_help="List schemes, architectures and runtimes.")(listing.command)
    app.command("demo", short_help="Do all of it with the embedded model, offline.")(demo.command)
    return typer.main.get_command(app)


def _root(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and exit.")
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"smolexport {installed('smolexport')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit

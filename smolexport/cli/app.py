"""The commands put together; one export command per installed converter."""

from __future__ import annotations

import click

from smolexport.cli import bench, calibrate, compare, demo, export, export_all, generate, inspect, listing, sweep
from smolexport.plugins import converters

HELP = """Small language models out of Python: a Hugging Face checkpoint becomes a quantized file, and every file is
held against the bf16 original.

\b
smolexport gguf HuggingFaceTB/SmolLM2-135M-Instruct --quant q8_0
smolexport mlx HuggingFaceTB/SmolLM2-135M-Instruct --quant q4
smolexport onnx HuggingFaceTB/SmolLM2-135M-Instruct --quant int4
smolexport all HuggingFaceTB/SmolLM2-135M-Instruct --quant int4 -o out
smolexport calibrate HuggingFaceTB/SmolLM2-135M-Instruct --text book.txt -o stats
smolexport compare HuggingFaceTB/SmolLM2-135M-Instruct out/*
smolexport sweep ./run-a ./run-b --quant int8,int4 -o sweep
smolexport demo
"""


class Commands(click.Group):
    """Commands that are listed in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Their names."""
        return list(self.commands)


def _show_version(context: click.Context, option: click.Parameter, asked: bool) -> None:  # noqa: ARG001
    if asked:
        from smolexport.conversion.model_card import installed_version

        click.echo(f"smolexport {installed_version()}")
        context.exit()


def build() -> click.Group:
    """The command `smolexport` with all others in it."""

    @click.group(cls=Commands, help=HELP, invoke_without_command=True, context_settings={"show_default": True})
    @click.option(
        "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
        help="Print the version and exit.",
    )  # fmt: skip
    @click.pass_context
    def root(context: click.Context) -> None:
        if context.invoked_subcommand is None:
            click.echo(context.get_help())

    for name in converters():
        root.add_command(export.command_for(name))
    for module in (export_all, calibrate, compare, sweep, bench, generate, inspect, listing, demo):
        root.add_command(module.command)
    return root

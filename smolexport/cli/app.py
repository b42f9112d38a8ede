"""The commands put together; one export command per installed converter."""

from __future__ import annotations

import click

from smolexport.cli import bench, calibrate, compare, demo, export, generate, inspect, listing, sweep
from smolexport.plugins import converters


class _Commands(click.Group):
    """Lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)


def _show_version(context: click.Context, option: click.Parameter, requested: bool) -> None:  # noqa: ARG001
    if requested:
        from smolexport.conversion.model_card import installed_version

        click.echo(f"smolexport {installed_version()}")
        context.exit()


@click.pass_context
def _root(context: click.Context) -> None:
    """Turn a Hugging Face checkpoint of a small language model into quantized files that run without Python, and
    compare every file with the bf16 original.

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
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def build() -> click.Group:
    """The command `smolexport` with all others in it."""
    version = click.option(
        "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
        help="Print the version and exit.",
    )  # fmt: skip
    group = click.group(cls=_Commands, invoke_without_command=True, context_settings={"show_default": True})
    root: click.Group = group(version(_root))
    for name in converters():
        root.add_command(export.command_for(name))
    root.add_command(export.every_format)
    for module in (calibrate, compare, sweep, bench, generate, inspect, listing, demo):
        root.add_command(module.command)
    return root

"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolexport.cli.streams import say
from smolexport.errors import UsageError
from smolexport.text import show

if TYPE_CHECKING:
    from smolexport.calibration.calibrator import Calibration

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Integer(click.IntRange):
    """A whole number within bounds, called `integer` in help and errors rather than `integer range`."""

    name = "integer"


class Number(click.FloatRange):
    """A number within bounds; NaN, which passes every comparison with a bound, is refused."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`value` as a float; raises BadParameter."""
        number = super().convert(value, param, ctx)
        return self.fail(f"{show(value)} is not a number.", param, ctx) if math.isnan(number) else number


def given_word(word: str) -> str:
    """`word` itself, for `type=`; raises BadParameter if it is empty, as from a variable that was never set."""
    if word == "":
        raise click.BadParameter("is empty")
    return word


def given_path(word: str) -> Path:
    """`word` as a path, for `type=`; an empty one does not mean the current folder."""
    return Path(given_word(word))


def words(text: str) -> list[str]:
    """The words between the commas of `text`, for `type=`."""
    return [word.strip() for word in given_word(text).split(",")]


def byte_size(word: str) -> int:
    """A number of bytes, for `type=`: 90MB, 1.5GB, 700000; powers of 1000."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([kmg]?)b?", word.strip().lower())
    size = float(found[1]) * 1000 ** " kmg".index(found[2] or " ") if found else 0
    if size < 1:
        raise click.BadParameter(f"{show(word)} is not a size; write it like 90MB, 1.5GB, 700KB or 700000.")
    return int(size)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as keyword arguments: numbers, true and false, otherwise text; raises UsageError."""
    given: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--set {setting}: must have the form KEY=VALUE")
        first = given.setdefault(key, value)
        if first != value:
            raise UsageError(f"--set {key}: is given twice, as {first} and as {value}")
    return {key: _value(word) for key, word in given.items()}


def _value(word: str) -> bool | int | float | str:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if re.fullmatch(r"-?[0-9]{1,18}", word):
        return int(word)
    return float(word) if re.fullmatch(r"-?[0-9]{1,18}\.[0-9]{1,18}", word) else word


def _settings(help: str) -> Decorator:  # noqa: A002
    """--set, whose value is a dictionary."""
    return click.option(
        "--set", "settings", metavar="KEY=VALUE", multiple=True, help=help,
        callback=lambda _context, _option, values: parse_settings(values),
    )  # fmt: skip


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator; --help lists them in this order."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


def _renamed(context: click.Context, _option: click.Parameter, value: str | None) -> None:
    """Refuse the former name of --target-kld."""
    if value is not None:
        raise click.UsageError("--max-kld is a threshold of `compare`; use --target-kld here", context)


checkpoint = click.argument("checkpoint", help="Checkpoint folder, hub id (owner/name), or the word demo.")
json = click.option("--json", is_flag=True, help="Print JSON on stdout instead of text.")
threads = click.option("--threads", type=Integer(min=1), help="Threads; default: chosen for the machine.")
text = click.option(
    "--text", metavar="PATH", type=given_path, help="UTF-8 text to score; default: the demo's held-out text."
)
format_settings = _settings("Option of the format; `smolexport list` names them; repeatable.")
runtime_settings = _settings("Option of a runtime, e.g. kv_type=f32 for llama.cpp or dtype=bf16 for MLX; repeatable.")
runtimes = click.option(
    "--runtime", "runtimes", metavar="NAME", multiple=True,
    help="Run files on this runtime; repeatable: each file on each runtime that can run it.",
)  # fmt: skip
source = together(
    click.option(
        "--ignore-config", metavar="KEY", multiple=True, help="Treat this key of config.json as inert; repeatable."
    ),
    click.option("--revision", help="Branch, tag or commit of a hub checkpoint."),
    click.option("--token", envvar="HF_TOKEN", show_envvar=True, help="Hub token for gated checkpoints."),
)


def calibration(command: Callable[..., Any]) -> Callable[..., Any]:
    """How weights are quantized: --method, --stats, --steps; how large the output may be: --size, --target-kld."""
    from smolexport.calibration.methods import methods

    known = methods()
    return together(
        click.option(
            "--method", type=click.Choice(list(known)), default="rtn", show_default=True,
            help=f"How weights are rounded: {'; '.join(f'{name}: {known[name].about}' for name in known)}.",
        ),
        click.option(
            "--stats", metavar="FOLDER", type=given_path,
            help="Output of `smolexport calibrate`: required by all methods except rtn, and by budgets.",
        ),
        click.option(
            "--steps", type=Integer(min=1),
            help="Training steps of distil; default: 80, of which the first 40 do most of the work.",
        ),
        click.option(
            "--size", metavar="SIZE", type=byte_size,
            help="Budget for the output with all its files, e.g. 90MB (KB, MB, GB: powers of 1000). Chooses 8 to 4 "
            "bits for each matrix, embedding and head included, for the smallest divergence. Needs --stats and "
            "PyTorch.",
        ),
        click.option(
            "--target-kld", metavar="NATS", type=Number(min=0, min_open=True),
            help="Budget for the divergence from the original, e.g. 0.02, measured on held-out windows of the "
            "statistics. Chooses the bits of each matrix for the smallest output. Needs --stats and PyTorch.",
        ),
        click.option("--max-kld", hidden=True, expose_value=False, callback=_renamed),
    )(command)  # fmt: skip


CALIBRATION = ("method", "stats", "steps", "size", "target_kld")


def calibration_of(
    method: str, stats: Path | None, steps: int | None, size: int | None, target_kld: float | None, *, measure: bool
) -> Calibration:
    """The calibration that these options describe; `measure`: not in a dry run.  Raises UsageError."""
    from smolexport.calibration.calibrator import Calibration
    from smolexport.calibration.knapsack import Budget
    from smolexport.calibration.trainer import DistilSettings

    if steps is not None and method != "distil":
        raise UsageError(f"--steps {steps}: applies only to training, and {method} has none; give --method distil")
    training = DistilSettings() if steps is None else DistilSettings(steps=steps)
    budget = Budget(size, target_kld, measure=measure, say=say) if size is not None or target_kld is not None else None
    return Calibration(method, stats, training=training, budget=budget)


def read_words(path: Path | None) -> str:
    """The UTF-8 text in the file `path`, None for stdin, with newlines as its only line ends; raises UsageError."""
    name = "stdin" if path is None else path
    try:
        data = path.read_bytes() if path is not None else sys.stdin.buffer.read() if sys.stdin is not None else b""
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from error

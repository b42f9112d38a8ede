"""Options that several commands share, and how progress is shown."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from smolexport.text import printable, prose, show

if TYPE_CHECKING:
    from smolexport.calibration.calibrator import Calibration

MAX_LABEL = 60  # characters beside a bar
F = TypeVar("F", bound=Callable[..., Any])


class Integer(click.IntRange):
    """A whole number within bounds, called by what it is rather than `integer range`."""

    name = "integer"


class Number(click.FloatRange):
    """A number within bounds, which nan is not: no comparison with a bound refuses it."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`value` as a float; raises what the option parser reports."""
        number = super().convert(value, param, ctx)
        return self.fail(f"{show(value)} is not a number.", param, ctx) if math.isnan(number) else number


class ByteSize(click.ParamType[int]):
    """A number of bytes: 90MB, 1.5GB, 700000; powers of 1000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """`value` in bytes; reports what is none."""
        import re

        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([kmg]?)b?", str(value).strip().lower())
        size = float(found[1]) * 1000 ** " kmg".index(found[2] or " ") if found else 0
        if size < 1:
            self.fail(f"{show(value)} is not a size; write it like 90MB, 1.5GB, 700KB or 700000.", param, ctx)
        return int(size)


def given_path(word: str) -> Path:
    """`word` as a path, for `type=`: "" is a variable that was never set, not the current folder."""
    return Path(given_word(word))


def given_word(word: str) -> str:
    """`word` itself, for `type=`; raises what the option parser reports when it is empty."""
    if word == "":
        raise click.BadParameter("is empty")
    return word


checkpoint_argument = click.argument("checkpoint", help="Checkpoint folder, hub id (owner/name), or the word demo.")
json_option = click.option("--json", is_flag=True, help="Print JSON on stdout instead of text.")
strict_option = click.option(
    "--strict", is_flag=True, help="Refuse when a tensor's shape does not allow the scheme's format."
)
threads_option = click.option("--threads", type=Integer(min=1), help="Threads; default: what suits the machine.")
format_options = click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True,
    help="Option of the format; `smolexport list` names them; repeatable.",
)  # fmt: skip
runtime_options = click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True,
    help="Option of a runtime, e.g. kv_type=f32 for llama.cpp or dtype=bf16 for MLX; repeatable.",
)  # fmt: skip


def source_options(command: F) -> F:
    """How the checkpoint is found and read: --ignore-config, --revision, --token."""
    inert = "Treat this key of config.json as inert; repeatable."
    for option in (
        click.option("--token", envvar="HF_TOKEN", show_envvar=True, help="Hub token for gated checkpoints."),
        click.option("--revision", help="Branch, tag or commit of a hub checkpoint."),
        click.option("--ignore-config", metavar="KEY", multiple=True, help=inert),
    ):  # the one applied last is listed first
        command = option(command)
    return command


def calibration_options(command: F) -> F:
    """How weights are quantized: --method, --stats, --steps."""
    from smolexport.calibration.methods import methods

    known = methods()
    for option in (
        click.option(
            "--steps", type=Integer(min=1), help="Training steps of distil; default: 80, half of them do most of it."
        ),
        click.option(
            "--stats", metavar="FOLDER", type=given_path,
            help="What `smolexport calibrate` made; for all but rtn, and for budgets.",
        ),
        click.option(
            "--method", type=click.Choice(list(known)), default="rtn", show_default=True,
            help=f"How weights are rounded: {'; '.join(f'{name}: {known[name].about}' for name in known)}.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def budget_options(command: F) -> F:
    """What an export may cost: --size, --target-kld; --max-kld names its successor."""
    for option in (
        click.option("--max-kld", hidden=True, expose_value=False, callback=_renamed),
        click.option(
            "--target-kld", metavar="NATS", type=Number(min=0, min_open=True),
            help="Choose bits tensor by tensor: the smallest output whose divergence from the original, measured on "
            "windows of the statistics that are held out, is at most this, e.g. 0.02. Needs --stats and PyTorch.",
        ),
        click.option(
            "--size", metavar="SIZE", type=ByteSize(),
            help="Choose bits tensor by tensor, 8 to 4, embedding and head included: the least divergence in an output "
            "of at most this size, e.g. 90MB, with all its files; KB, MB, GB are powers of 1000. Needs --stats and "
            "PyTorch.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def _renamed(context: click.Context, option: click.Parameter, value: str | None) -> None:
    """Refuse the former name of --target-kld."""
    if value is not None:
        raise click.BadParameter("is the name of a threshold of compare; say --target-kld.", context, option)


def calibration_of(
    method: str, stats: Path | None, steps: int | None, size: int | None, target_kld: float | None, *, measure: bool
) -> Calibration:
    """What --method, --stats, --steps, --size and --target-kld ask for; raises UsageError."""
    from smolexport.calibration.calibrator import Calibration
    from smolexport.calibration.knapsack import Budget
    from smolexport.calibration.trainer import DistilSettings
    from smolexport.errors import UsageError

    if steps is not None and method != "distil":
        raise UsageError(f"--steps {steps}: are those of a training, and {method} has none; give --method distil")
    training = DistilSettings() if steps is None else DistilSettings(steps=steps)
    budget = Budget(size, target_kld, measure=measure, say=say) if size is not None or target_kld is not None else None
    return Calibration(method, stats, training=training, budget=budget)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as keyword arguments: numbers, true and false, otherwise text.

    Raises:
        UsageError: another form, or one key with two values.
    """
    from smolexport.errors import UsageError

    given: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--set {setting}: should have the form KEY=VALUE")
        first = given.setdefault(key, value)
        if first != value:
            raise UsageError(f"--set {key}: is given twice, as {first} and as {value}")
    return {key: _value(word) for key, word in given.items()}


def _value(word: str) -> bool | int | float | str:
    import re

    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if re.fullmatch(r"-?[0-9]{1,18}", word):
        return int(word)
    return float(word) if re.fullmatch(r"-?[0-9]{1,18}\.[0-9]{1,18}", word) else word


def read_words(path: Path | None) -> str:
    """The UTF-8 text in the file `path`, None for stdin, its lines ended by newlines alone; raises UsageError."""
    import sys

    from smolexport.errors import UsageError

    name = "stdin" if path is None else path
    try:
        data = path.read_bytes() if path is not None else sys.stdin.buffer.read() if sys.stdin is not None else b""
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from error


def say(text: str) -> None:
    """A note for people, on stderr; names in it may come from a stranger's file."""
    click.echo(prose(text), err=True)


def print_json(value: Any) -> None:
    """`value` as indented JSON on stdout, in ASCII: strangers' names may hold what a terminal obeys or reorders."""
    import json

    click.echo(json.dumps(value, indent=2, allow_nan=False))


@contextlib.contextmanager
def progress_bar(label: str, total: int, *, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A bar on stderr, when that is a terminal; yields the function that advances it."""
    import sys

    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *((DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (TaskProgressColumn(), TextColumn(unit))),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(label, MAX_LABEL), total=total)
        yield lambda count: bar.advance(task, count)

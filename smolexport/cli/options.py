"""Options that several commands share, and how progress is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Checkpoint",
    "FormatOptions",
    "IgnoreConfig",
    "Json",
    "Revision",
    "RuntimeOptions",
    "Threads",
    "Token",
    "given_path",
    "given_word",
    "parse_settings",
    "print_json",
    "progress_bar",
    "read_words",
    "say",
]

Checkpoint = Annotated[str, typer.Argument(help="Checkpoint folder, hub id (owner/name), or the word demo.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; default: what suits the machine.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub checkpoint.")]
Token = Annotated[str | None, typer.Option("--token", envvar="HF_TOKEN", help="Hub token for gated checkpoints.")]
IgnoreConfig = Annotated[
    list[str] | None,
    typer.Option("--ignore-config", metavar="KEY", help="Treat this key of config.json as inert; repeatable."),
]


RuntimeOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Option of a runtime, e.g. kv_type=f32 for llama.cpp or dtype=bf16 for MLX; repeatable.",
    ),
]


FormatOptions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Option of the format; `smolexport list` names them; repeatable."),
]


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` words as keyword arguments: numbers, true and false, otherwise text.

    Raises:
        UsageError: another form, or one key with two values.
    """
    from smolexport.errors import UsageError

    given: dict[str, str] = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--set {setting}: should have the form KEY=VALUE")
        first = given.setdefault(key, value)
        if first != value:
            raise UsageError(f"--set {key}: is given twice, as {first} and as {value}")
    return {key: _value(word) for key, word in given.items()}


def given_path(word: str) -> Path:
    """`word` as a path, for `parser=`: "" is a variable that was never set, not the current folder."""
    return Path(given_word(word) or "")


def given_word(word: str | None) -> str | None:
    """`word` itself, for `callback=`; raises what the option parser reports when it is empty."""
    if word == "":
        raise typer.BadParameter("is empty")
    return word


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
    """A note for people, on stderr; names in it may come from a stranger's file: no control characters."""
    typer.echo("".join(c if c.isprintable() or c == "\n" else "?" for c in text), err=True)


def print_json(value: Any) -> None:
    """`value` as indented JSON on stdout; where that is not UTF-8, all but ASCII as JSON's own escapes."""
    import codecs
    import json
    import sys

    unicode = codecs.lookup(getattr(sys.stdout, "encoding", None) or "ascii").name == "utf-8"
    typer.echo(json.dumps(value, indent=2, ensure_ascii=not unicode, allow_nan=False))


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
        TextColumn("{task.description}"),
        BarColumn(),
        *((DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (TaskProgressColumn(), TextColumn(unit))),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)

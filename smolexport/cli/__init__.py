"""The command line: thin commands, one file each; data on stdout, progress and notes on stderr.

Exit codes: 0 done, 1 a parity threshold was missed or a task of a sweep failed, 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from smolexport.cli.streams import secure
from smolexport.text import one_line

if TYPE_CHECKING:
    import click

__all__ = ["main"]

BAD_INPUT, INTERRUPTED = 2, 130


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM: unwinds, so that half-written files are removed.

    Not a KeyboardInterrupt, of which the option parser makes a silent exit.
    """


def _on_signal(*_: object) -> NoReturn:
    raise _Stopped


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `smolexport` command; ends in SystemExit."""
    secure()
    import click

    from smolexport.cli.app import build
    from smolexport.errors import SmolexportError

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _on_signal)
    try:
        code = _run(build(), list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # a full disk behind `> file` shows here, while it can still be reported
    except SmolexportError as error:
        _fail(str(error), BAD_INPUT)
    except click.ClickException as error:
        _fail(_usage(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort, _Stopped):
        _fail("interrupted; nothing was left half-written", INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)  # whoever read our output has gone (`| head`): nothing to report
    except MemoryError:
        _fail("out of memory", BAD_INPUT)
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", BAD_INPUT)
    else:
        sys.exit(code)


def _run(command: click.Group, argv: list[str]) -> int:
    """The exit code.  Not by the parser's own `main`, which makes a failure of a reader that goes away."""
    import click

    try:
        with command.make_context("smolexport", argv) as context:
            command.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return 0


def _fail(message: str, code: int) -> NoReturn:
    print(f"smolexport: {one_line(message)}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


def _usage(error: click.ClickException) -> str:
    """What is wrong, and where the help is."""
    context = getattr(error, "ctx", None)
    return error.format_message() + (f" (see '{context.command_path} --help')" if context else "")

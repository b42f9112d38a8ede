"""The command line: thin commands, one file each; data on stdout, progress and notes on stderr.

Exit codes: 0 done, 1 a parity threshold was missed or a task of a sweep failed, 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from smolexport.cleanup import Stopper, undo_all
from smolexport.cli.streams import secure
from smolexport.text import one_line

if TYPE_CHECKING:
    import click

BAD_INPUT, INTERRUPTED = 2, 130
STDERR = 2  # its file descriptor
NAMED = 3  # things that could not be removed


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM: unwinds, so that half-written files are removed.

    Not a KeyboardInterrupt, of which the option parser makes a silent exit.
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `smolexport` command; ends in SystemExit."""
    secure()
    import click

    stopper = Stopper(_Stopped, _leave)
    stopper.install(signal.SIGINT, signal.SIGTERM)
    try:
        code, message = _outcome(list(sys.argv[1:] if argv is None else argv))
        stopper.finish()
    except (KeyboardInterrupt, click.Abort, _Stopped):
        stopper.finish()
        code, message = INTERRUPTED, _interrupted()
    if message:
        _say(message)
    if code == INTERRUPTED and argv is None:
        _end()
    sys.exit(code)


def _outcome(argv: Sequence[str]) -> tuple[int, str]:
    """The exit code, and what there is to be said of a failure."""
    import click

    from smolexport.cli.app import build
    from smolexport.errors import SmolexportError

    try:
        code = _run(build(), list(argv))
        sys.stdout.flush()  # a full disk behind `> file` shows here, while it can still be reported
    except SmolexportError as error:
        return BAD_INPUT, str(error)
    except click.ClickException as error:
        return error.exit_code, _usage(error)
    except BrokenPipeError:
        return 0, ""  # whoever read our output has gone (`| head`): nothing to report
    except MemoryError:
        return BAD_INPUT, "out of memory"
    except OSError as error:
        return BAD_INPUT, f"{error.filename or 'input/output'}: {error.strerror or error}"
    return code, ""


def _interrupted() -> str:
    """Undo what is half done, and say whether that went well."""
    left = [str(path) for path in undo_all()]
    if not left:
        return "interrupted; nothing was left half-written"
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    return f"interrupted; cannot be removed, do it yourself: {', '.join(left[:NAMED])}{more}"


def _leave() -> NoReturn:
    """End the process at the second signal, which may have come while the first one's work was under way."""
    try:
        # anew: a stream that was at work when the signal came takes nothing
        sys.stderr = open(STDERR, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        _say(_interrupted())
    finally:
        os._exit(INTERRUPTED)


def _end() -> NoReturn:
    """End the process after an interruption without waiting for threads.

    A signal that arrives while a library starts a thread of its pool leaves one that nobody tells to stop, and the
    interpreter would wait for it forever.
    """
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(INTERRUPTED)


def _run(command: click.Group, argv: list[str]) -> int:
    """The exit code.  Not by the parser's own `main`, which makes a failure of a reader that goes away."""
    import click

    try:
        with command.make_context("smolexport", argv) as context:
            command.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return 0


def _say(message: str) -> None:
    print(f"smolexport: {one_line(message)}", file=sys.stderr)  # noqa: T201


def _usage(error: click.ClickException) -> str:
    """What is wrong, and where the help is."""
    context = getattr(error, "ctx", None)
    return error.format_message() + (f" (see '{context.command_path} --help')" if context else "")

"""The command line: thin commands, one file each; data on stdout, progress and notes on stderr.

Exit codes: 0 done, 1 a parity threshold was missed or a task of a sweep failed, 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from smolexport.cleanup import Stopper, undo_all
from smolexport.cli.streams import secure
from smolexport.errors import SmolexportError
from smolexport.text import one_line

BAD_INPUT, INTERRUPTED = 2, 130
STDERR = 2  # its file descriptor
NAMED = 3  # paths that could not be removed, in the message


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM: unwinds, so that half-written files are removed.

    Not a KeyboardInterrupt, which the option parser turns into a silent exit.
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `smolexport` command; ends in SystemExit."""
    secure()
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


def _outcome(argv: list[str]) -> tuple[int, str]:
    """The exit code, and the message of a failure."""
    from smolexport.cli.app import build

    code = 0
    try:
        try:  # not `Command.main`, which makes a failure of a reader that goes away
            with build().make_context("smolexport", argv) as context:
                context.command.invoke(context)
        except click.exceptions.Exit as end:
            code = end.exit_code
        sys.stdout.flush()  # a full disk behind `> file` shows here, while it can still be reported
    except SmolexportError as error:
        return BAD_INPUT, str(error)
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        see = f" (see '{where.command_path} --help')" if where else ""
        return error.exit_code, error.format_message() + see
    except BrokenPipeError:
        return 0, ""  # the reader of our output has gone (`| head`)
    except MemoryError:
        return BAD_INPUT, "out of memory"
    except OSError as error:
        return BAD_INPUT, f"{error.filename or 'input/output'}: {error.strerror or error}"
    return code, ""


def _interrupted() -> str:
    """Undo what is half done; returns the message, which names what could not be undone."""
    left = [str(path) for path in undo_all()]
    if not left:
        return "interrupted; nothing was left half-written"
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    return f"interrupted; remove what could not be removed: {', '.join(left[:NAMED])}{more}"


def _leave() -> NoReturn:
    """End the process at the second signal, which may come while the first one is being handled."""
    try:
        # reopened: a stream that was being written when the signal came cannot be used
        sys.stderr = open(STDERR, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        _say(_interrupted())
    finally:
        os._exit(INTERRUPTED)


def _end() -> NoReturn:
    """End the process after an interruption without waiting for threads.

    A signal that arrives while a library starts a thread of its pool may leave one that is never told to stop, and the
    interpreter would wait for it forever.
    """
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(INTERRUPTED)


def _say(message: str) -> None:
    print(f"smolexport: {one_line(message)}", file=sys.stderr)  # noqa: T201

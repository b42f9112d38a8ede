"""Every error that smolexport raises on purpose; third-party exceptions are turned into these where they arise.

Messages name the file or the tensor, what was found, and what to do.  Whatever names they contain, they are printed as
one line that is safe for a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from smolexport.text import one_line, reason


class SmolexportError(Exception):
    """Base of all errors; the command line prints one line and exits with 2."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(SmolexportError):
    """An argument or option that cannot be used: an unknown scheme, two outputs of one name."""


class MissingDependencyError(UsageError):
    """An optional library is not installed; the message says how to install it."""


class CheckpointError(SmolexportError):
    """The checkpoint is missing, damaged or contradictory."""


class ConfigError(CheckpointError):
    """A key of config.json is missing, malformed or unknown."""


class TensorError(CheckpointError):
    """A tensor is missing, unexpected, not finite or of the wrong shape."""


class TokenizerError(CheckpointError):
    """A tokenizer file is missing, damaged or of an unknown kind."""


class UnsupportedError(SmolexportError):
    """A valid model that the target format or runtime cannot represent."""


class OutputError(SmolexportError):
    """The output exists already or cannot be written."""


class FileFormatError(SmolexportError):
    """An exported file is damaged or of another format."""


class CalibrationError(SmolexportError):
    """Statistics of a checkpoint are missing, damaged or belong to another one."""


class SessionError(SmolexportError):
    """A runtime session cannot serve the call."""


class SessionClosedError(SessionError):
    """The session was closed."""


class ContextOverflowError(SessionError):
    """More tokens than the session's context length."""


@contextmanager
def importing(owner: str, modules: Sequence[str], install: str) -> Iterator[None]:
    """Turn a failed import of the `modules` that `owner` needs into MissingDependencyError with the line `install`."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:  # the latter two: a shared library that does not load
        raise MissingDependencyError(f"{owner} needs {' and '.join(modules)} ({reason(error)}): {install}") from error

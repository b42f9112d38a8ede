"""Every error that smolexport raises on purpose.

    SmolexportError                 one line for a person; the command line prints it and exits with 2
    ├── UsageError                  an argument that cannot be: unknown scheme, two outputs for one name …
    │   └── MissingDependencyError  an optional library is not installed; carries the pip line
    ├── CheckpointError             something in the checkpoint's folder is missing, damaged or contradictory
    │   ├── ConfigError             config.json: a key that is missing, malformed or not understood
    │   ├── TensorError             a tensor that is missing, unexpected, mis-shaped or not finite
    │   └── TokenizerError          tokenizer.json and its companions
    ├── UnsupportedError            a sound model that the target format or runtime cannot represent
    ├── OutputError                 the output exists already, or could not be written
    ├── FileFormatError             an exported file is damaged or not what its name says
    ├── CalibrationError            statistics of a checkpoint that are missing, damaged or of another one
    └── SessionError                a runtime session was used in a way that it cannot serve
        ├── SessionClosedError      after close()
        └── ContextOverflowError    more tokens than the session's context holds

Third-party exceptions are turned into these where they arise.  Messages name the file or the tensor, what was
found, and what to do.  Whatever the names in them hold, they come out as one line that a terminal can print.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from smolexport.text import one_line, reason


class SmolexportError(Exception):
    """Base of all deliberate errors."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(SmolexportError):
    """An argument or option that cannot be honoured."""


class MissingDependencyError(UsageError):
    """An optional library is needed and not installed."""


class CheckpointError(SmolexportError):
    """The checkpoint is missing, damaged or contradictory."""


class ConfigError(CheckpointError):
    """A key of config.json is missing, malformed or not understood."""


class TensorError(CheckpointError):
    """A tensor is missing, unexpected, mis-shaped or not finite."""


class TokenizerError(CheckpointError):
    """The tokenizer files are missing, damaged or of a kind that is not understood."""


class UnsupportedError(SmolexportError):
    """A sound model that the target cannot represent."""


class OutputError(SmolexportError):
    """The output exists already or could not be written."""


class FileFormatError(SmolexportError):
    """An exported file is damaged or of another kind."""


class CalibrationError(SmolexportError):
    """Statistics of a checkpoint are missing, damaged or of another one."""


class SessionError(SmolexportError):
    """A runtime session cannot serve the call."""


class SessionClosedError(SessionError):
    """The session was closed."""


class ContextOverflowError(SessionError):
    """More tokens than the session's context holds."""


@contextmanager
def importing(owner: str, modules: Sequence[str], install: str) -> Iterator[None]:
    """Turn a failed import of the `modules` that `owner` needs into MissingDependencyError with the line `install`."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:  # the latter two: a shared library that does not load
        raise MissingDependencyError(f"{owner} needs {' and '.join(modules)} ({reason(error)}): {install}") from error

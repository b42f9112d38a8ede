"""Converters and runtimes, found by name: any importable `smolexport_to_*` or `smolexport_on_*`.

Nothing has to be registered: a third-party `smolexport_to_coreml` works as soon as it is installed.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from smolexport.errors import FileFormatError, MissingDependencyError, SmolexportError, UsageError

if TYPE_CHECKING:  # the command line lists names without loading numpy
    from smolexport.calibration.trainer import Trainer
    from smolexport.conversion.converter import Converter
    from smolexport.run.session import Runtime

TO, ON = "smolexport_to_", "smolexport_on_"
ENTRIES = 256  # of the import path, whose names are cached
SCALARS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((float, int), "a number"),
    "str": ((str,), "text"),
    "None": ((type(None),), "nothing"),
}


def _names(prefix: str) -> list[str]:
    """Names on the import path that begin with `prefix`, without it.  A folder is listed again once it has changed."""
    found = set[str]()
    for entry in (Path(entry) for entry in sys.path if isinstance(entry, str)):  # importers skip anything else
        with suppress(OSError):  # a missing entry
            found |= _adapters(entry.absolute(), entry.stat().st_mtime_ns)
    return sorted(name.removeprefix(prefix) for name in found if name.startswith(prefix))


@lru_cache(ENTRIES)
def _adapters(entry: Path, _changed: int) -> frozenset[str]:
    """Names of the converters and runtimes in an entry of the import path."""
    if entry.is_dir():  # pkgutil would look into all folders of a site-packages, hundreds of them
        with os.scandir(entry) as files:
            names = [_module(file) for file in files if file.name.startswith((TO, ON))]
    else:  # a zip file, or whatever another importer handles
        from pkgutil import iter_modules

        names = [module.name for module in iter_modules([str(entry)])]
    return frozenset(name for name in names if name.startswith((TO, ON)) and "." not in name)


def _module(file: os.DirEntry[str]) -> str:
    """The name under which `file` is imported; empty if it is neither a module nor a package."""
    if not file.is_dir():
        return inspect.getmodulename(file.name) or ""
    return file.name if any(inspect.getmodulename(inner.name) == "__init__" for inner in Path(file).iterdir()) else ""


def converters() -> list[str]:
    """Names of the formats that can be written."""
    return _names(TO)


def runtimes() -> list[str]:
    """Names of the runtimes, usable or not; see `missing`."""
    return _names(ON)


def converter(name: str) -> Converter:
    """The converter for the format `name`; raises UsageError."""
    if name not in converters():
        raise UsageError(f"no converter for the format '{name}'; installed: {', '.join(converters())}")
    return cast("Converter", import_module(TO + name))


def adapter(name: str) -> Runtime:
    """The runtime `name`, whether or not the libraries that it needs are installed; raises UsageError."""
    if name not in runtimes():
        raise UsageError(f"no runtime '{name}'; installed: {', '.join(runtimes())}")
    return cast("Runtime", import_module(ON + name))


def missing(name: str) -> str | None:
    """How to install the libraries that the runtime `name` lacks; None if it has all."""
    module = adapter(name)
    absent = [m for m in module.REQUIRES if importlib.util.find_spec(m) is None]
    return f"needs {' and '.join(absent)}: {module.INSTALL_HINT}" if absent else None


def runtime(name: str) -> Runtime:
    """The runtime `name`, ready to open files; raises UsageError, MissingDependencyError."""
    line = missing(name)
    if line is not None:
        raise MissingDependencyError(f"the runtime {adapter(name).NAME} {line}")
    return adapter(name)


def _first(names: Sequence[str], otherwise: SmolexportError) -> Runtime:
    """The first of these runtimes whose libraries are installed.  Raises `otherwise` if there are no names."""
    if not names:
        raise otherwise
    return runtime(next((name for name in names if missing(name) is None), names[0]))


def converter_for(path: Path) -> Converter:
    """The converter of the format of `path`; raises FileFormatError, also for a checkpoint."""
    if not path.exists():
        raise FileFormatError(f"{path}: no such {'folder' if _ends_like(path, folder=True) else 'file'}")
    module = _recognised(path)
    if module is not None:
        return module
    if is_checkpoint(path):
        raise FileFormatError(
            f"{path}: is a checkpoint, not an exported file; export it first, e.g. smolexport all {path} -o out"
        )
    raise FileFormatError(f"{path}: is none of the known formats ({', '.join(converters())})")


def _recognised(path: Path) -> Converter | None:
    """The converter that recognises `path`; raises FileFormatError for a pipe, which may block when it is read."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FileFormatError(f"{path}: is a pipe or device, neither a file nor a folder")
    return next((module for module in map(converter, converters()) if module.recognises(path)), None)


def runtime_for(path: Path, name: str | None = None) -> Runtime:
    """The runtime called `name` (see `find_runtime`) for `path`, a checkpoint folder or an exported file.

    None: the first that reads the format and whose libraries are installed; a package whose name extends another's
    comes after it.

    Raises:
        FileFormatError: an unknown format.
        UsageError: no runtime has that name, or it reads another format.
        MissingDependencyError: the runtime for this format is not installed.
    """
    exported = _recognised(path)
    kind = exported.FORMAT if exported else "checkpoint" if is_checkpoint(path) else converter_for(path).FORMAT
    able = [known for known in runtimes() if kind == adapter(known).READS]
    if name is None:
        return _first(able, FileFormatError(f"{path}: no installed runtime runs the format '{kind}'"))
    chosen = find_runtime(name)
    if chosen not in able:
        others = ", ".join(adapter(known).NAME for known in able) or "nothing installed"
        raise UsageError(f"{path}: {adapter(chosen).NAME} does not run the format '{kind}'; run by: {others}")
    return runtime(chosen)


def checkpoint_runtime(function: str = "open") -> Runtime:
    """The reference: the first installed runtime of checkpoints with `function`; raises MissingDependencyError."""
    able = [name for name in runtimes() if adapter(name).READS == "checkpoint" and hasattr(adapter(name), function)]
    hint = f"no installed runtime of checkpoints has {function}: pip install smolexport[torch]"
    return _first(able, MissingDependencyError(hint))


def trainer() -> Trainer:
    """The `TRAINER` of the first installed runtime that has one; raises MissingDependencyError."""
    able = [name for name in runtimes() if hasattr(adapter(name), "TRAINER")]
    hint = "no installed runtime has a trainer: pip install smolexport[torch]"
    return cast("Trainer", import_module(_first(able, MissingDependencyError(hint)).TRAINER))  # type: ignore[attr-defined]


def find_runtime(name: str) -> str:
    """The package name of the runtime that `name` means: that name or its own, in any case; raises UsageError."""
    word = name.lower().replace("-", "_")
    for known in runtimes():
        if word in (known, adapter(known).NAME.lower().replace("-", "_")):
            return known
    raise UsageError(f"no runtime '{name}'; installed: {', '.join(adapter(known).NAME for known in runtimes())}")


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is the folder of a checkpoint, judged by the names in it."""
    return path.is_dir() and (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def _ends_like(path: Path, *, folder: bool) -> bool:
    """Whether the name ends like an output of a format whose outputs are folders, or files."""
    suffixes = [module.SUFFIX for module in map(converter, converters()) if module.FOLDER is folder]
    return any(path.name.endswith(suffix) and path.name != suffix for suffix in suffixes)


def locate(model: str | Path, runtime: str | None = None) -> tuple[Path, Runtime]:
    """The exported file or checkpoint folder that `model` (file, folder, hub id or `demo`) means, and its runtime.

    Raises the errors of `runtime_for`; CheckpointError for neither a folder nor a model on the hub or in the cache;
    UsageError for `demo` if a checkpoint folder of that name exists.
    """
    from smolexport.model.checkpoint import find_checkpoint

    path = Path(model) if _names_file(str(model)) else find_checkpoint(model)
    return path, runtime_for(path, runtime)


def _names_file(model: str) -> bool:
    """Whether `model` is a file, or missing but spelled like an exported file or folder.

    Hub ids may look alike: `owner/x-1.5b`, or `owner/x-mlx` if there is no folder `owner`.
    """
    path = Path(model)
    try:
        if path.exists():
            return not path.is_dir()
    except OSError:  # a name that no file can have
        return False
    like_hub = len(path.parts) == 2
    if _ends_like(path, folder=True) and not (like_hub and not path.parent.is_dir()):
        return True
    return _ends_like(path, folder=False) or (path.suffix != "" and not like_hub)


def checked_options(
    function: Callable[..., Any], options: Mapping[str, Any], owner: str, known: Collection[str] | None = None
) -> Mapping[str, Any]:
    """`options`, checked as keyword arguments of `function`, a runtime's `open` or a converter's `plan`.

    Their names are `known`, or by default `known_options`; messages name the `owner`.  Raises UsageError for another
    name or a value of the wrong type.
    """
    annotated = _annotations(function)
    kinds_of = annotated if known is None else {name: annotated.get(name, [""]) for name in known}
    for key, value in options.items():
        if key not in kinds_of:
            some = f"it has {', '.join(kinds_of)}" if kinds_of else "it has none"
            raise UsageError(f"--set {key}: {owner} has no such option; {some}")
        kinds = kinds_of[key]
        if "" not in kinds and not any(type(value) in SCALARS[kind][0] for kind in kinds):
            words = " or ".join(SCALARS[kind][1] for kind in kinds if kind != "None")
            given = str(value).lower() if isinstance(value, bool) else value
            raise UsageError(f"--set {key}={given}: this option of {owner} takes {words}")
    return options


def known_options(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the options of a runtime's `open`, in their order.

    These are the parameters annotated with numbers, bool, str, None and unions of them, or not annotated, in which case
    their values are not checked; except `path`, `threads` and `context`.
    """
    return tuple(_annotations(function))


def _annotations(function: Callable[..., Any]) -> dict[str, list[str]]:
    """The members of each option's annotation, [""] without one."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("path", "threads", "context") or parameter.kind is parameter.VAR_KEYWORD:
            continue
        text = parameter.annotation
        if text is parameter.empty:
            found[name] = [""]
            continue
        if not isinstance(text, str):  # compared as text: it may name what only type checkers import
            text = inspect.formatannotation(text)
        kinds = [kind.strip() for kind in text.split("|")]
        if set(kinds) <= SCALARS.keys():
            found[name] = kinds
    return found

"""Finding converters and runtimes by their names: any importable `smolexport_to_*` or `smolexport_on_*`.

Nothing registers: a stranger's `smolexport_to_coreml` works the day it is installed.
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

from smolexport.errors import FileFormatError, MissingDependencyError, UsageError

if TYPE_CHECKING:  # the command line lists names without loading numpy
    from smolexport.calibration.trainer import Trainer
    from smolexport.conversion.converter import Converter
    from smolexport.run.session import Runtime

TO, ON = "smolexport_to_", "smolexport_on_"
ENTRIES = 256  # of the import path, whose names are kept
SCALARS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((float, int), "a number"),
    "str": ((str,), "text"),
    "None": ((type(None),), "nothing"),
}


def _names(prefix: str) -> list[str]:
    """Names on the import path that begin with `prefix`, without it.  A folder is listed again when it has changed."""
    found = set[str]()
    for entry in (Path(entry) for entry in sys.path if isinstance(entry, str)):  # importers skip anything else
        with suppress(OSError):  # what is not there holds nothing
            found |= _adapters(entry.absolute(), entry.stat().st_mtime_ns)
    return sorted(name.removeprefix(prefix) for name in found if name.startswith(prefix))


@lru_cache(ENTRIES)
def _adapters(entry: Path, _changed: int) -> frozenset[str]:
    """Names of the converters and runtimes in an entry of the import path.

    pkgutil would look into every folder in it, hundreds in a site-packages, whatever their names.
    """
    if entry.is_dir():
        with os.scandir(entry) as files:
            names = [_module(file) for file in files if file.name.startswith((TO, ON))]
    else:  # a zip file, or what another importer knows
        from pkgutil import iter_modules

        names = [module.name for module in iter_modules([str(entry)])]
    return frozenset(name for name in names if name.startswith((TO, ON)) and "." not in name)


def _module(file: os.DirEntry[str]) -> str:
    """The name by which `file` is imported, a module or a package; nothing for anything else."""
    if not file.is_dir():
        return inspect.getmodulename(file.name) or ""
    return file.name if any(inspect.getmodulename(inner.name) == "__init__" for inner in Path(file).iterdir()) else ""


def converters() -> list[str]:
    """Names of the formats that can be written."""
    return _names(TO)


def runtimes() -> list[str]:
    """Names of the runtime adapters, usable or not; see `missing`."""
    return _names(ON)


def converter(name: str) -> Converter:
    """The converter module for the format `name`.

    Raises:
        UsageError: there is none; names those that there are.
    """
    if name not in converters():
        raise UsageError(f"no converter for the format '{name}'; installed: {', '.join(converters())}")
    return cast("Converter", import_module(TO + name))


def adapter(name: str) -> Runtime:
    """The runtime module `name`, whether or not what it needs is installed; raises UsageError."""
    if name not in runtimes():
        raise UsageError(f"no runtime '{name}'; installed: {', '.join(runtimes())}")
    return cast("Runtime", import_module(ON + name))


def missing(name: str) -> str | None:
    """The line that installs what the runtime `name` needs and has not; None when all is there."""
    module = adapter(name)
    absent = [m for m in module.REQUIRES if importlib.util.find_spec(m) is None]
    return f"needs {' and '.join(absent)}: {module.INSTALL_HINT}" if absent else None


def runtime(name: str) -> Runtime:
    """The runtime module `name`, ready to open files.

    Raises:
        UsageError: there is none.
        MissingDependencyError: it needs a library that is not installed.
    """
    line = missing(name)
    if line is not None:
        raise MissingDependencyError(f"the runtime {adapter(name).NAME} {line}")
    return adapter(name)


def converter_for(path: Path) -> Converter:
    """The converter whose format `path` has.

    Raises:
        FileFormatError: no such file, a checkpoint, or of no known format.
    """
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
    """The converter that takes `path` for its own; raises FileFormatError for what may never end when it is read."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FileFormatError(f"{path}: is a pipe or device, neither a file nor a folder")
    return next((module for module in map(converter, converters()) if module.recognises(path)), None)


def runtime_for(path: Path, name: str | None = None) -> Runtime:
    """The runtime that runs `path`: a checkpoint folder or an exported file.

    Args:
        path: what shall be run.
        name: of the runtime, as people or as packages have it; None: of those that read the format, the first whose
            libraries are there.  A package whose name extends another's comes after it.

    Raises:
        FileFormatError: of no known format.
        UsageError: no runtime has that name, or it reads another format.
        MissingDependencyError: the runtime of this format is not installed.
    """
    exported = _recognised(path)
    kind = exported.FORMAT if exported else "checkpoint" if is_checkpoint(path) else converter_for(path).FORMAT
    players = [player for player in runtimes() if kind == adapter(player).READS]
    if name is not None:
        chosen = find_runtime(name)
        if chosen not in players:
            others = ", ".join(adapter(player).NAME for player in players) or "nothing installed"
            raise UsageError(f"{path}: {adapter(chosen).NAME} does not run the format '{kind}'; run by: {others}")
        return runtime(chosen)
    if not players:
        raise FileFormatError(f"{path}: no installed runtime runs the format '{kind}'")
    return runtime(_first(players))


def checkpoint_runtime(function: str = "open") -> Runtime:
    """The reference: the runtime of checkpoints that has `function`, the first whose libraries are there.

    Raises:
        MissingDependencyError: none is installed.
    """
    able = [name for name in runtimes() if adapter(name).READS == "checkpoint" and hasattr(adapter(name), function)]
    if not able:
        raise MissingDependencyError(
            f"no installed runtime of checkpoints has {function}: pip install smolexport[torch]"
        )
    return runtime(_first(able))


def trainer() -> Trainer:
    """The trainer of the first runtime that names one as its `TRAINER` and whose libraries are there.

    Raises:
        MissingDependencyError: none is installed.
    """
    able = [name for name in runtimes() if hasattr(adapter(name), "TRAINER")]
    if not able:
        raise MissingDependencyError("no installed runtime has a trainer: pip install smolexport[torch]")
    return cast("Trainer", import_module(runtime(_first(able)).TRAINER))  # type: ignore[attr-defined]


def _first(names: Sequence[str]) -> str:
    """The first of these runtimes whose libraries are there, else the first."""
    return next((name for name in names if missing(name) is None), names[0])


def find_runtime(name: str) -> str:
    """The runtime that `name` means, in any case: its package's name or its own, as `adapter` takes it.

    Raises:
        UsageError: there is none; names those that there are.
    """
    wanted = name.lower().replace("-", "_")
    for known in runtimes():
        if wanted in (known, adapter(known).NAME.lower().replace("-", "_")):
            return known
    raise UsageError(f"no runtime '{name}'; installed: {', '.join(adapter(known).NAME for known in runtimes())}")


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint's folder, from the names in it."""
    return path.is_dir() and (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def _ends_like(path: Path, *, folder: bool) -> bool:
    """Whether the name ends as the outputs of a format do that are folders, or files."""
    suffixes = [module.SUFFIX for module in map(converter, converters()) if module.FOLDER is folder]
    return any(path.name.endswith(suffix) and path.name != suffix for suffix in suffixes)


def locate(model: str | Path, runtime: str | None = None) -> tuple[Path, Runtime]:
    """The exported file or checkpoint folder that `model` stands for, and the runtime that runs it.

    Args:
        model: exported file, checkpoint folder, hub id, or `demo`.
        runtime: name of the one to take; None: see `runtime_for`.

    Raises:
        FileFormatError: no such file, or of no known format.
        CheckpointError: neither a folder nor a model on the hub or in the cache.
        UsageError: `demo`, where a checkpoint folder of that name lies too; a runtime that does not play it.
        MissingDependencyError: the runtime of this format is not installed.
    """
    from smolexport.model.checkpoint import find_checkpoint

    path = Path(model) if _names_file(str(model)) else find_checkpoint(model)
    return path, runtime_for(path, runtime)


def _names_file(model: str) -> bool:
    """Whether `model` is a file, or missing but spelled like an exported file or folder.

    Names on the hub look alike: `owner/x-1.5b`, and `owner/x-mlx` where no folder `owner` is.
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
    """`options` as further keyword arguments of `function`.

    Only parameters that words can express are options: those annotated with numbers, truth values, text, None and
    unions of these, and those without annotation, whose values are not checked.

    Args:
        function: a runtime's `open` or a converter's `plan`.
        options: names and values.
        owner: whose options they are, for messages.
        known: the names that may be set; None = all such parameters but `path`, `threads` and `context`.

    Raises:
        UsageError: an option that it does not know, naming those that it does; a value of the wrong type.
    """
    kinds_of = {p.name: kinds for p in inspect.signature(function).parameters.values() if (kinds := _kinds(p))}
    if known is not None:
        kinds_of = {name: kinds_of.get(name, [""]) for name in known}
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
    """Names of the parameters of a runtime's `open` that words can set, in their order."""
    return tuple(p.name for p in inspect.signature(function).parameters.values() if _kinds(p))


def _kinds(parameter: inspect.Parameter) -> list[str]:
    """The names in a parameter's annotation, [""] without one; none for what words cannot express.

    Read as text: an annotation may name what only type checkers import.
    """
    if parameter.name in ("path", "threads", "context") or parameter.kind is parameter.VAR_KEYWORD:
        return []
    if parameter.annotation is parameter.empty:
        return [""]
    text = (
        parameter.annotation
        if isinstance(parameter.annotation, str)
        else inspect.formatannotation(parameter.annotation)
    )
    kinds = [kind.strip() for kind in text.split("|")]
    return kinds if set(kinds) <= SCALARS.keys() else []

"""Which tasks there are: checkpoints x formats x schemes."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from smolexport import plugins
from smolexport.conversion.model_card import installed_version
from smolexport.errors import CheckpointError, MissingDependencyError, UsageError
from smolexport.model.checkpoint import find_checkpoint

RAY = "pip install 'smolexport[ray]'"
STATE, TABLE = ".sweep", "sweep.json"  # beside the outputs


@dataclass(frozen=True)
class SweepSource:
    """A checkpoint of the sweep."""

    given: str  # on the command line
    name: str  # of its outputs, unique in the sweep
    folder: Path | None  # None if it was not found
    error: str = ""  # why not


@dataclass(frozen=True)
class SweepConfig:
    """What all tasks of a sweep share."""

    out: str  # folder of the outputs
    text: str | None = None  # to score; None = outputs are not compared
    window: int = 512  # tokens
    max_windows: int | None = None
    ignore_config: Sequence[str] = ()  # keys of config.json to treat as inert
    force: bool = False  # redo everything, and replace whatever has the name of an output
    version: str = field(default_factory=installed_version)
    mark: str = ""  # in the name of a file in `out` that shows a worker that it sees the same folder


@dataclass(frozen=True)
class Task:
    """One output.  Plain values only, so that it can be sent to another process or machine."""

    source: str  # the checkpoint as given
    name: str  # of the checkpoint's outputs
    folder: str  # of the checkpoint; empty if it was not found
    format: str
    scheme: str  # the format's own name of it
    config: SweepConfig
    fingerprint: str = ""  # of the checkpoint's files
    seen: str = ""  # their signature when the fingerprint was taken
    threads: int = 1
    origin: str = ""  # the checkpoint as the output's owner: a hub id, or the folder's full path

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"{self.name} {self.format} {self.scheme}"

    @property
    def key(self) -> Path:
        """Its path in folders that hold something of every task."""
        return Path(self.name) / f"{self.format}-{self.scheme}"


def find_sources(
    checkpoints: Sequence[str], *, revision: str | None = None, token: str | None = None, weights: bool = True
) -> list[SweepSource]:
    """Find every checkpoint (folder, hub id or `demo`); one that cannot be found is a source with an error.

    Without `weights` those of a hub id are not downloaded.  Raises UsageError for no checkpoint, an empty name, or the
    same checkpoint twice.
    """
    if not checkpoints:
        raise UsageError("no checkpoint to export: name at least one")
    found: list[SweepSource] = []
    for given in checkpoints:
        try:
            folder = find_checkpoint(given, revision=revision, token=token, weights=weights)
            found.append(SweepSource(given, "", folder.resolve()))
        except CheckpointError as error:
            found.append(SweepSource(given, "", None, str(error)))
    places: dict[str, str] = {}
    for source in found:
        place = str(source.folder or Path(source.given).absolute())
        if place in places:
            raise UsageError(f"{source.given}: is the same checkpoint as {places[place]}; name each once")
        places[place] = source.given
    names = _names(found)
    return [replace(source, name=name) for source, name in zip(found, names, strict=True)]


def _names(sources: Sequence[SweepSource]) -> list[str]:
    """The last part of each path or hub id, preceded by as many others as it takes to tell them apart."""
    parts = [_parts(source) for source in sources]
    counts = [1] * len(sources)
    while True:
        names = ["-".join(words[-count:]) for words, count in zip(parts, counts, strict=True)]
        folded = [name.casefold() for name in names]
        alike = [place for place, name in enumerate(folded) if folded.count(name) > 1]
        longer = [place for place in alike if counts[place] < len(parts[place])]
        if not alike:
            return names
        if not longer:
            first = alike[0]
            second = folded.index(folded[first], first + 1)
            given = f"{sources[first].given} and {sources[second].given}"
            raise UsageError(f"{given}: cannot be told apart by their names; rename one of them")
        for place in longer:
            counts[place] += 1


def _parts(source: SweepSource) -> list[str]:
    """The parts of a checkpoint's path; of a hub id those of the id, not of the cache."""
    path = Path(source.given) if source.given == "demo" or _of_hub(source) else Path(source.given).resolve()
    words = [part for part in path.parts if part not in ("/", "\\", path.anchor)]
    return [word.encode("utf-8", "replace").decode() for word in words] or ["model"]


def _of_hub(source: SweepSource) -> bool:
    return source.folder not in (None, Path(source.given).resolve()) and source.given != "demo"


def pairs(formats: Sequence[str] | None, quants: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Every requested (format, scheme), and a line for each scheme that a format does not have.

    `formats`: None = every installed converter; `quants`: schemes for all formats that have them, or `FORMAT:SCHEME`
    for one.  Raises UsageError for an unknown format, or a scheme that no format has.
    """
    names = plugins.converters() if formats is None else list(formats)
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--formats {','.join(names)}: name each format once, and at least one")
    modules = {name: plugins.converter(name) for name in names}
    found: dict[tuple[str, str], None] = {}
    lines = []
    for word in quants:
        one, colon, scheme = word.partition(":")
        if colon and one not in modules:
            raise UsageError(f"--quant {word}: the format '{one}' is not one of those requested: {', '.join(modules)}")
        lacking: dict[str, UsageError] = {}
        for name in [one] if colon else names:
            try:
                found[name, modules[name].find_scheme(scheme if colon else word).name] = None
            except UsageError as error:
                lacking[name] = error
        if len(lacking) == (1 if colon else len(names)):
            refusal = next(iter(lacking.values()))
            many = f"--quant {word}: none of {', '.join(lacking)} has such a scheme; `smolexport list` names them"
            raise refusal if len(lacking) == 1 else UsageError(many)
        lines += [f"{name} has no scheme {word}: skipped" for name in lacking]
    return sorted(found, key=lambda pair: names.index(pair[0])), lines


def tasks_of(sources: Sequence[SweepSource], requested: Sequence[tuple[str, str]], config: SweepConfig) -> list[Task]:
    """A task for each checkpoint and each `requested` (format, scheme).

    Raises UsageError if outputs would go into a checkpoint, or under a name that the sweep itself uses.
    """
    for source in sources:
        target = Path(config.out) / source.name
        inside = source.folder in (target.resolve(), target.parent.resolve())
        if source.name in (STATE, TABLE, "..") or (source.folder and inside):
            raise UsageError(f"{target}: cannot hold the outputs of {source.given}; give another folder with -o")
    return [
        Task(
            source.given, source.name, folder, form, scheme, config, origin=source.given if _of_hub(source) else folder
        )
        for source in sources
        for folder in [str(source.folder or "")]
        for form, scheme in requested
    ]


def check_libraries(formats: Collection[str], *, ray: bool) -> None:
    """Refuse before any work what lacks a library: Ray, or else one to compare `formats` on this machine.

    The machines of a cluster check their own libraries.  Raises MissingDependencyError.
    """
    if ray:
        if importlib.util.find_spec("ray") is None:
            raise MissingDependencyError(f"--engine ray: needs ray: {RAY}")
        return
    kinds = ["checkpoint", *(plugins.converter(name).FORMAT for name in formats)] if formats else []
    lines = [line for line in dict.fromkeys(map(_missing, kinds)) if line]
    if lines:
        raise MissingDependencyError(f"{'; '.join(lines)}; or pass --no-compare")


def _missing(kind: str) -> str:
    """What has to be installed to run files of this kind; empty if one of its runtimes is ready."""
    lines = {name: plugins.missing(name) for name in plugins.runtimes() if kind == plugins.adapter(name).READS}
    if None in lines.values():
        return ""
    for name, line in lines.items():
        return f"the runtime {plugins.adapter(name).NAME} {line}"
    return f"no installed runtime runs the format '{kind}'"

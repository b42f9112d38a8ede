"""Which tasks there are: checkpoints x formats x schemes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from smolexport import plugins
from smolexport.conversion.model_card import installed_version
from smolexport.errors import CheckpointError, MissingDependencyError, UsageError
from smolexport.model.checkpoint import find_checkpoint

STATE, TABLE = ".sweep", "sweep.json"  # what else lies in the folder of the outputs


@dataclass(frozen=True)
class SweepSource:
    """A checkpoint of the sweep.

    Attributes:
        given: as it was named.
        name: what its outputs are called; no two of a sweep have the same.
        folder: where it lies; None where it was not found.
        error: why not.
    """

    given: str
    name: str
    folder: Path | None
    error: str = ""


@dataclass(frozen=True)
class SweepConfig:
    """What holds for every task of a sweep.

    Attributes:
        out: folder of the outputs.
        text: what is scored; None = exported files are not compared.
        window: tokens per window.
        max_windows: score at most so many.
        ignore_config: keys of config.json that the caller vouches for as inert.
        force: replace what stands where an output goes, whoever made it.
        version: of smolexport.
        mark: in the name of a file in `out`, by which a worker knows that it sees the same folder.
    """

    out: str
    text: str | None = None
    window: int = 512
    max_windows: int | None = None
    ignore_config: Sequence[str] = ()
    force: bool = False
    version: str = field(default_factory=installed_version)
    mark: str = ""


@dataclass(frozen=True)
class Task:
    """One output.  Plain values only, so that it goes through a pipe to another process or machine.

    Attributes:
        source: the checkpoint as it was named.
        name: what its outputs are called.
        folder: where it lies; empty where it was not found.
        format: e.g. `gguf`.
        scheme: the format's own name of it.
        config: what holds for every task.
        fingerprint: of the checkpoint's files.
        seen: their sizes and dates when the fingerprint was taken.
        threads: that it may use.
        origin: whose output it is: a hub id, or the folder's full path.
    """

    source: str
    name: str
    folder: str
    format: str
    scheme: str
    config: SweepConfig
    fingerprint: str = ""
    seen: str = ""
    threads: int = 1
    origin: str = ""

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{self.name} {self.format} {self.scheme}"

    @property
    def key(self) -> Path:
        """Its place in folders that hold something of every task."""
        return Path(self.name) / f"{self.format}-{self.scheme}"


def find_sources(
    checkpoints: Sequence[str], *, revision: str | None = None, token: str | None = None, weights: bool = True
) -> list[SweepSource]:
    """Find every checkpoint; one that is not there is a source with an error.

    Args:
        checkpoints: folders, hub ids, or `demo`.
        revision: hub revision.
        token: hub token.
        weights: False = the weights of a hub id stay there.

    Raises:
        UsageError: none at all, an empty name, one named twice.
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
    """The last part of each path or hub id, with as many of the parts before it as it takes to tell them apart."""
    parts = [_parts(source) for source in sources]
    counts = [1] * len(sources)
    while True:
        names = ["-".join(words[-count:]) for words, count in zip(parts, counts, strict=True)]
        groups: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            groups.setdefault(name.casefold(), []).append(place)
        alike = [place for group in groups.values() if len(group) > 1 for place in group]
        longer = [place for place in alike if counts[place] < len(parts[place])]
        if not alike:
            return names
        if not longer:
            first, second = (sources[place].given for place in alike[:2])
            raise UsageError(f"{first} and {second}: cannot be told apart by their names; rename one of them")
        for place in longer:
            counts[place] += 1


def _parts(source: SweepSource) -> list[str]:
    """The words that name a checkpoint; of a hub id those of the id, not of the cache."""
    path = Path(source.given) if source.given == "demo" or _of_hub(source) else Path(source.given).resolve()
    words = [part for part in path.parts if part not in ("/", "\\", path.anchor)]
    return [word.encode("utf-8", "replace").decode() for word in words] or ["model"]


def _of_hub(source: SweepSource) -> bool:
    return source.folder not in (None, Path(source.given).resolve()) and source.given != "demo"


def pairs(formats: Sequence[str] | None, quants: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Every (format, scheme) that is asked for, and a line for each scheme that a format has not.

    Args:
        formats: format names; None = every installed converter.
        quants: schemes, for all formats that have them, or `FORMAT:SCHEME` for one.

    Raises:
        UsageError: an unknown format; a scheme that none of the formats has.
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
            raise UsageError(f"--quant {word}: the format '{one}' is none of those asked for: {', '.join(modules)}")
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
        lines += [f"{name} has no scheme {word}: left out" for name in lacking]
    order = {name: place for place, name in enumerate(names)}
    return sorted(found, key=lambda pair: order[pair[0]]), lines


def tasks_of(sources: Sequence[SweepSource], wanted: Sequence[tuple[str, str]], config: SweepConfig) -> list[Task]:
    """A task for each checkpoint and each of the `wanted` (format, scheme).

    Raises:
        UsageError: the outputs of a checkpoint would go where they must not.
    """
    for source in sources:
        target = Path(config.out) / source.name
        inside = source.folder in (target.resolve(), target.parent.resolve())
        if source.name in (STATE, TABLE, "..") or (source.folder and inside):
            raise UsageError(f"{target}: is not a place for the outputs of {source.given}; give another folder with -o")
    return [
        Task(
            source.given, source.name, folder, form, scheme, config, origin=source.given if _of_hub(source) else folder
        )
        for source, folder in ((source, str(source.folder or "")) for source in sources)
        for form, scheme in wanted
    ]


def check_runtimes(formats: Collection[str]) -> None:
    """Refuse a comparison for which a library is missing here; raises MissingDependencyError."""
    lacking = [_lacking("checkpoint"), *(_lacking(plugins.converter(name).FORMAT) for name in formats)]
    lines = [line for line in dict.fromkeys(lacking) if line]
    if lines:
        raise MissingDependencyError(f"{'; '.join(lines)}; or pass --no-compare")


def _lacking(kind: str) -> str:
    """What has to be installed to run the format `kind`; empty where one of its runtimes is ready."""
    players: Mapping[str, str | None] = {
        name: plugins.missing(name) for name in plugins.runtimes() if kind == plugins.adapter(name).READS
    }
    if None in players.values():
        return ""
    if not players:
        return f"no installed runtime runs the format '{kind}'"
    name, line = next(iter(players.items()))
    return f"the runtime {plugins.adapter(name).NAME} {line}"

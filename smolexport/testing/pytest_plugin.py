"""pytest plugin: exported files as tests of a project.

    pytest --smolexport-checkpoint ./my-model --smolexport-file out/my-model.gguf --smolexport-gate parity.toml

collects one test per file, `parity[my-model.gguf]`, marked `smolexport`, which fails with the thresholds that the file
misses.  Without `--smolexport-gate`, `parity.toml` in the folder where pytest was started or in its root folder is
used; without one, only finite logits are required.  Paths are relative to the folder in which pytest was started.
Fixtures for a project's own tests:

    smolexport_comparison     the `Comparison` of all those files, made once for all tests
    smolexport_parity(file)   one file's `CandidateResult`, from that comparison if it contains the file

Unused, the plugin costs the import of this file: nothing else is loaded before a parity test runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from smolexport.errors import SmolexportError
    from smolexport.parity.inputs import Settings
    from smolexport.parity.results import CandidateResult, Comparison
    from smolexport.parity.thresholds import Thresholds

_GATE = "parity.toml"
_ACCURACY_ALONE: dict[str, Any] = {"greedy_tokens": 0, "repetitions": 0, "memory": False}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    group = parser.getgroup("smolexport", "parity of exported models with their checkpoint")
    group.addoption("--smolexport-checkpoint", metavar="CHECKPOINT", help="folder, hub id, or demo: the reference")
    group.addoption(
        "--smolexport-file", metavar="PATH", action="append", default=[],
        help="exported file or folder of it, one test each; repeatable",
    )  # fmt: skip
    group.addoption(
        "--smolexport-gate", metavar="FILE", help=f"thresholds, TOML (default: {_GATE} here or in the root folder)"
    )
    group.addoption("--smolexport-text", metavar="FILE", help="UTF-8 text to score (default: the demo's)")
    group.addoption("--smolexport-max-windows", metavar="N", type=int, help="score at most this many windows")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker; refuse files without a checkpoint."""
    config.addinivalue_line("markers", "smolexport: compares an exported file with its checkpoint")
    for name in ("checkpoint", "file", "gate", "text"):
        given = config.getoption(f"smolexport_{name}")
        if "" in (given if isinstance(given, list) else [given]):
            raise pytest.UsageError(f"--smolexport-{name} is empty: a variable that was never set?")
    if config.getoption("smolexport_checkpoint"):
        config.stash[_LAB] = _Lab(config)
    elif config.getoption("smolexport_file"):
        raise pytest.UsageError("--smolexport-file needs --smolexport-checkpoint: the model that it was exported from")


def pytest_report_header(config: pytest.Config) -> str | None:
    """The files, the checkpoint and the gate, if there are any."""
    lab = config.stash.get(_LAB, None)
    if lab is None:
        return None
    gate = lab.gate or f"none (no {_GATE} here): only finite logits are required"
    return f"smolexport: {len(lab.files)} files against {lab.checkpoint}, gate: {gate}"


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a test for each file."""
    lab = config.stash.get(_LAB, None)
    if lab is not None and lab.files:
        items.extend(_Files.from_parent(session, name="smolexport", nodeid="smolexport", lab=lab).collect())


@pytest.fixture(scope="session")
def smolexport_comparison(pytestconfig: pytest.Config) -> Comparison:
    """All files of the command line compared with their checkpoint, computed once."""
    lab = _lab(pytestconfig)
    if not lab.files:
        pytest.fail("smolexport_comparison needs --smolexport-file", pytrace=False)
    found = lab.comparison
    return pytest.fail(str(found), pytrace=False) if isinstance(found, Exception) else found


@pytest.fixture(scope="session")
def smolexport_parity(pytestconfig: pytest.Config) -> Callable[..., CandidateResult]:
    """`parity(file, *, thresholds=None, settings=None, text=None)`: the file's figures, and its misses in `missed`.

    A file of the command line comes from the comparison of all, unless other conditions are given; any other is
    compared now.
    """
    lab = _lab(pytestconfig)

    def parity(file: str | Path, **conditions: Any) -> CandidateResult:
        path = lab.folder / file
        if path in lab.files and not any(value is not None for value in conditions.values()):
            found = lab.result(lab.files.index(path))
        else:
            found = lab.alone(path, **conditions)
        return pytest.fail(str(found), pytrace=False) if isinstance(found, Exception) else found

    return parity


class _Lab:
    """The options of a run and their comparison, made when it is first needed."""

    def __init__(self, config: pytest.Config) -> None:
        self.folder = config.invocation_params.dir
        name = config.getoption("smolexport_checkpoint")
        self.checkpoint = self.folder / name if (self.folder / name).is_dir() else name
        self.files = [self.folder / name for name in config.getoption("smolexport_file")]
        given, usual = config.getoption("smolexport_gate"), (self.folder / _GATE, config.rootpath / _GATE)
        self.gate = self.folder / given if given else next(filter(Path.is_file, usual), None)
        self._text = config.getoption("smolexport_text")
        self._max_windows = config.getoption("smolexport_max_windows")
        self._alone: dict[int, CandidateResult | SmolexportError] = {}

    @cached_property
    def comparison(self) -> Comparison | SmolexportError:
        """All files at once; an error, of whichever file, is kept like a result."""
        return self._compare(self.files)

    def result(self, index: int) -> CandidateResult | SmolexportError:
        """One file's figures; if the comparison of all fails, each file's own, so that a bad one fails alone."""
        found = self.comparison
        if not isinstance(found, Exception):
            return found.candidates[index]
        if len(self.files) == 1:
            return found
        if index not in self._alone:
            self._alone[index] = self.alone(self.files[index])
        return self._alone[index]

    def alone(self, path: Path, **conditions: Any) -> CandidateResult | SmolexportError:
        """The figures of one file, compared now."""
        made = self._compare([path], **conditions)
        return made if isinstance(made, Exception) else made.candidates[0]

    def _compare(
        self,
        files: list[Path],
        *,
        thresholds: Thresholds | None = None,
        settings: Settings | None = None,
        text: str | None = None,
    ) -> Comparison | SmolexportError:
        """Accuracy only, unless `settings` say otherwise."""
        import smolexport
        from smolexport.cli.options import read_words
        from smolexport.parity.thresholds import read_gate

        try:
            if text is None and self._text is not None:
                text = read_words(self.folder / self._text)
            return smolexport.compare(
                self.checkpoint,
                files,
                text=text,
                settings=settings or smolexport.Settings(max_windows=self._max_windows, **_ACCURACY_ALONE),
                thresholds=thresholds or (read_gate(self.gate) if self.gate else None),
            )
        except smolexport.SmolexportError as error:
            return error


_LAB: pytest.StashKey[_Lab] = pytest.StashKey()


def _lab(config: pytest.Config) -> _Lab:
    lab = config.stash.get(_LAB, None)
    if lab is None:
        pytest.fail("this test needs --smolexport-checkpoint", pytrace=False)
    return lab


class _Files(pytest.Collector):
    """The parent of the tests of files in pytest's tree."""

    def __init__(self, *, lab: _Lab, **rest: Any) -> None:
        super().__init__(**rest)
        self._lab = lab

    def collect(self) -> Iterator[pytest.Item]:
        names = [path.name for path in self._lab.files]
        for index, path in enumerate(self._lab.files):
            label = str(path) if names.count(path.name) > 1 else path.name
            label += f" #{index + 1}" if self._lab.files.count(path) > 1 else ""
            yield _File.from_parent(self, name=f"parity[{label}]", lab=self._lab, index=index)


class _File(pytest.Item):
    """One exported file."""

    def __init__(self, *, lab: _Lab, index: int, **rest: Any) -> None:
        super().__init__(**rest)
        self._lab, self._index = lab, index
        self.add_marker("smolexport")

    def runtest(self) -> None:
        from smolexport.text import printable

        found = self._lab.result(self._index)
        if isinstance(found, Exception):
            raise _MissedError(str(found))
        accuracy = found.accuracy
        figures = {
            "kld": accuracy.kld.mean.value,
            "top1": accuracy.top1_agreement.value,
            "ppl_ratio": accuracy.perplexity_ratio.value,
            "positions": accuracy.positions,
        }
        self.user_properties.extend(figures.items())
        if found.missed:
            shown = ", ".join(f"{name} {value:.6g}" for name, value in figures.items())
            lines = (*found.missed, *(f"note: {printable(note)}" for note in found.notes), f"figures: {shown}")
            raise _MissedError("\n".join(lines))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The misses themselves; a traceback only for other exceptions."""
        if isinstance(excinfo.value, _MissedError):
            return f"{self._lab.files[self._index]}\n{excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self._lab.files[self._index], None, self.name


class _MissedError(Exception):
    """A file that misses a threshold or cannot be compared."""

"""Converters and runtimes are found by their names alone, strangers' ones too."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest

from smolexport import plugins
from smolexport.errors import FileFormatError, MissingDependencyError, SmolexportError, UsageError
from smolexport.parity.candidates import exported
from tests.children import python
from tests.cli.commands import assert_refused, call, tiny_checkpoint


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path with somebody else's converter and runtime."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "smolexport_to_nothing.py").write_text(
        dedent("""
        from dataclasses import replace
        import smolexport_to_gguf
        from smolexport.conversion.plan import ByteRange, OutputFile
        from smolexport_to_gguf import SCHEMES, check, find_scheme
        FORMAT, SUFFIX, FOLDER, DEFAULT, OPTIONS = "nothing", ".nothing", False, "f16", {}
        def plan(model, scheme):
            plan = smolexport_to_gguf.plan(model, scheme)
            nothing = tuple(ByteRange(entry.name, 7, 0) for entry in plan.entries)
            return replace(plan, files=(OutputFile("", b"NOTHING", nothing, 7),))
        def recognises(path):
            return path.is_file() and path.read_bytes()[:7] == b"NOTHING"
        def describe(path):
            raise NotImplementedError
        def lint(path):
            return []
        def replaceable(path):
            return recognises(path)
        """)
    )
    (site / "smolexport_on_nothing.py").write_text(
        dedent("""
        NAME, READS, REQUIRES, INSTALL_HINT = "Nothing", "nothing", ("a_library_that_is_not",), "pip install nothing"
        def version(): return "0"
        def open(path, *, threads=None, context=None): raise NotImplementedError
        """)
    )
    monkeypatch.syspath_prepend(site)
    yield site
    for name in ("smolexport_to_nothing", "smolexport_on_nothing", "smolexport_on_nothing_else"):
        sys.modules.pop(name, None)


def test_ours() -> None:
    assert "gguf" in plugins.converters()
    assert {"llamacpp", "torch"} <= set(plugins.runtimes())
    assert plugins.converter("gguf").FORMAT == "gguf"
    assert plugins.adapter("llamacpp").READS == "gguf"


def test_what_is_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be imported under such a name; it goes with its place on the import path."""
    for package in ("smolexport_to_package", "smolexport_on_compiled"):
        (tmp_path / package).mkdir()
    (tmp_path / "smolexport_to_package" / "__init__.py").touch()
    (tmp_path / "smolexport_on_compiled" / "__init__.pyc").touch()
    (tmp_path / "smolexport_to_module.py").touch()
    (tmp_path / "smolexport_to_c.abi3.so").touch()
    for other in ("smolexport_to_empty", "smolexport_to_x-0.1.dist-info", "inner/smolexport_to_deep"):
        (tmp_path / other).mkdir(parents=True)
    for other in ("smolexport_to_text.txt", "smolexport_to_a.b.py", "smolexport_to_x-0.1.dist-info/__init__.py"):
        (tmp_path / other).touch()
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as file:
        file.writestr("smolexport_to_zipped.py", "")
        file.writestr("smolexport_on_zipped/__init__.py", "")
    ours = plugins.converters(), plugins.runtimes()
    with monkeypatch.context() as change:
        for place in (tmp_path, tmp_path / "some.zip", tmp_path / "missing"):
            change.syspath_prepend(str(place))
        change.setattr(sys, "path", [*sys.path, 5, tmp_path / "inner"])  # no importer takes these
        assert set(plugins.converters()) - set(ours[0]) == {"c", "module", "package", "zipped"}
        assert set(plugins.runtimes()) - set(ours[1]) == {"compiled", "zipped"}
        (tmp_path / "smolexport_on_late.py").touch()
        os.utime(tmp_path, (1, 1))  # as a clock that is too coarse for a test would not show it
        assert "late" in plugins.runtimes()
        assert "deep" not in plugins.converters()
    assert (plugins.converters(), plugins.runtimes()) == ours


def test_plugins_beside_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty entry of the import path is the folder that one is in, as long as that is there."""
    (tmp_path / "smolexport_to_here.py").touch()
    (tmp_path / "gone").mkdir()
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.chdir(tmp_path)
    assert "here" in plugins.converters()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "gguf" in plugins.converters()
    assert "here" not in plugins.converters()


LISTED = """
import collections, json, sys
seen = collections.Counter()
def look(event, args):
    if event in ("os.listdir", "os.scandir") and "importlib" not in sys._getframe(1).f_code.co_filename:
        seen[str(args[0])] += 1
sys.addaudithook(look)
from smolexport.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("\\n" + json.dumps(seen))
"""


@pytest.mark.parametrize("command", ["--version", "list", "gguf demo --dry-run", "inspect FILE"])
def test_the_import_path_is_listed_once(command: str, tmp_path: Path) -> None:
    """Nor does a command look into the packages there; imports themselves list folders of their own accord."""
    (tmp_path / "FILE").touch()
    path = json.loads(python("import json, sys; print(json.dumps(sys.path))"))
    argv = command.replace("FILE", str(tmp_path / "FILE")).split()
    seen = json.loads(python(LISTED, *argv).splitlines()[-1])
    places = [str(Path(entry).absolute()) for entry in path]
    assert {place: seen[place] for place in places if seen.get(place, 0) > 1} == {}
    inside = [name for name in seen if str(Path(name).parent) in places and name not in places]
    assert [name for name in inside if not Path(name).name.startswith("smolexport")] == []


@pytest.mark.parametrize("name", ["", "onxx", "../gguf", "gguf.container", "gguf "])
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(UsageError, match=r"installed: .*gguf"):
        plugins.converter(name)
    with pytest.raises(UsageError, match=r"installed: .*llamacpp"):
        plugins.runtime(name)


def test_a_stranger_is_found(strangers: Path, tmp_path: Path) -> None:
    assert "nothing" in plugins.converters()
    assert "nothing" in plugins.runtimes()
    target = tmp_path / "x.nothing"
    outcome = call("nothing", tiny_checkpoint(tmp_path), "-o", target)
    assert (outcome.code, outcome.out) == (0, f"{target}\n")
    assert plugins.converter_for(target).FORMAT == "nothing"
    listing = call("list").out
    assert "nothing: schemes for `smolexport nothing CHECKPOINT" in listing
    assert "needs a_library_that_is_not: pip install nothing" in listing


def test_a_missing_library_is_one_line_with_the_remedy(strangers: Path, tmp_path: Path) -> None:
    (tmp_path / "x.nothing").write_bytes(b"NOTHING")
    with pytest.raises(MissingDependencyError) as caught:
        plugins.runtime_for(tmp_path / "x.nothing")
    assert str(caught.value) == "the runtime Nothing needs a_library_that_is_not: pip install nothing"
    outcome = call("generate", tmp_path / "x.nothing", "Once")
    assert (outcome.code, outcome.err) == (2, f"smolexport: {caught.value}\n")


def test_of_two_runtimes_the_first_that_is_there_plays(strangers: Path, tmp_path: Path) -> None:
    """`nothing` needs what is not installed, `nothing_else` runs the same; a name decides otherwise."""
    (tmp_path / "x.nothing").write_bytes(b"NOTHING")
    other = strangers / "smolexport_on_nothing_else.py"
    other.write_text('NAME, READS, REQUIRES, INSTALL_HINT = "Else", "nothing", (), "-"\n')
    assert plugins.runtime_for(tmp_path / "x.nothing").NAME == "Else"
    assert plugins.runtime_for(tmp_path / "x.nothing", "nothing-else").NAME == "Else"
    with pytest.raises(MissingDependencyError, match="the runtime Nothing needs"):
        plugins.runtime_for(tmp_path / "x.nothing", "Nothing")
    with pytest.raises(UsageError, match=r"x\.nothing: llama\.cpp does not run the format 'nothing'"):
        plugins.runtime_for(tmp_path / "x.nothing", "LLAMA.CPP")
    with pytest.raises(UsageError, match=r"no runtime 'x'; installed: .*Nothing, Else"):
        plugins.runtime_for(tmp_path / "x.nothing", "x")
    (strangers / "a_library_that_is_not.py").touch()
    assert plugins.runtime_for(tmp_path / "x.nothing").NAME == "Nothing"


def test_files_are_recognised_by_content(tmp_path: Path) -> None:
    (tmp_path / "wrong.txt").write_bytes(b"GGUF and more")
    assert plugins.converter_for(tmp_path / "wrong.txt").FORMAT == "gguf"
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(FileFormatError, match=r"model\.gguf: is none of the known formats \(.*gguf"):
        plugins.converter_for(tmp_path / "model.gguf")
    with pytest.raises(FileFormatError, match="no such file"):
        plugins.converter_for(tmp_path / "nothing")
    with pytest.raises(FileFormatError, match=r"nothing-mlx: no such folder$"):
        plugins.converter_for(tmp_path / "nothing-mlx")
    with pytest.raises(SmolexportError, match="none of the known formats"):
        plugins.runtime_for(tmp_path)


def test_a_checkpoint_is_told_from_an_exported_file(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    said = "is a checkpoint, not an exported file; export it first, e.g. smolexport all"
    with pytest.raises(FileFormatError, match=said):
        plugins.converter_for(folder)
    assert_refused(call("inspect", folder), folder, said)
    with pytest.raises(FileFormatError, match=said):
        exported([folder])


@pytest.mark.parametrize(
    ("model", "is_file"),
    [
        ("missing-mlx", True),
        ("here/missing-mlx", True),
        ("here/missing-mlx/", True),
        ("far/away/missing-mlx", True),
        ("./missing-mlx", True),
        ("missing.gguf", True),
        ("owner/missing.gguf", True),
        ("owner/name-mlx", False),
        ("owner/name-1.5b", False),
        ("owner/-mlx", False),
        ("here/-mlx", False),
        ("owner/name", False),
        ("here", False),
    ],
)
def test_what_is_missing_and_what_may_be_on_the_hub(
    model: str, is_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name like that of an exported folder is one, unless it could be a hub id: owner/name, and no folder owner."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    asked: list[str | Path] = []

    def found(source: str | Path) -> Path:
        asked.append(source)
        return tmp_path

    monkeypatch.setattr("smolexport.model.checkpoint.find_checkpoint", found)
    with pytest.raises(FileFormatError, match="none of the known" if not is_file else "no such f"):
        plugins.locate(model)
    assert asked == ([] if is_file else [model])


def test_a_checkpoint_folder_plays_on_torch(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    if plugins.missing("torch"):
        with pytest.raises(MissingDependencyError, match="torch"):
            plugins.runtime_for(folder)
    else:
        assert plugins.runtime_for(folder).NAME == "torch"


def stranger(**annotations: object) -> Any:
    """A runtime whose `open` has the parameters scale and hook, annotated so or not at all."""

    def open(path, *, threads=None, scale=1.0, hook=None): ...  # type: ignore[no-untyped-def]  # noqa: A001

    open.__annotations__ = annotations
    return SimpleNamespace(NAME="Stranger", open=open)


@pytest.mark.parametrize("annotation", ["float | None", float | None])
def test_options_of_a_stranger(annotation: object) -> None:
    module = stranger(scale=annotation, hook="Callable[[str], None] | None")
    for value in (0.5, 2, None):
        assert plugins.checked_options(module.open, {"scale": value}, module.NAME) == {"scale": value}
    for wrong in ("0.5", True, [1.0]):
        with pytest.raises(UsageError, match=r"this option of Stranger takes a number$"):
            plugins.checked_options(module.open, {"scale": wrong}, module.NAME)
        assert plugins.checked_options(stranger().open, {"scale": wrong}, "x") == {"scale": wrong}
    with pytest.raises(UsageError, match=r"--set hook: Stranger has no such option; it has scale$"):
        plugins.checked_options(module.open, {"hook": "x"}, module.NAME)


def test_the_trainer_is_one_that_a_runtime_names(strangers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    assert plugins.trainer().NAME == "torch"
    other = strangers / "smolexport_on_nothing_else.py"
    other.write_text('NAME, READS, REQUIRES, INSTALL_HINT, TRAINER = "Else", "nothing", (), "-", __name__\n')
    monkeypatch.setattr(plugins, "runtimes", lambda: ["nothing", "nothing_else"])
    assert plugins.trainer().NAME == "Else"
    monkeypatch.setattr(plugins, "runtimes", lambda: ["nothing"])
    with pytest.raises(MissingDependencyError, match=r"has a trainer: pip install smolexport\[torch\]"):
        plugins.trainer()


UNINSTALLED = """
import importlib.metadata as metadata, sys
found = metadata.distribution
def hidden(name):
    if name == "smolexport":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.distribution = hidden
from smolexport.cli import main
few = ["--tokens", "256", "--window", "32"]
for argv in (["--version"], ["mlx", sys.argv[1], "-o", sys.argv[2]], ["calibrate", "demo", *few, "-o", sys.argv[3]]):
    try:
        main(argv)
    except SystemExit as end:
        print(end.code)
"""


def test_a_source_tree_that_is_not_installed_exports_and_calibrates(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = tiny_checkpoint(tmp_path)
    said = python(UNINSTALLED, str(folder), str(tmp_path / "out"), str(tmp_path / "stats")).split("\n")
    assert said[:6] == ["smolexport (uninstalled)", "0", str(tmp_path / "out"), "0", str(tmp_path / "stats"), "0"]

"""Which tasks a sweep has: names that tell checkpoints apart, schemes that formats have or have not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from smolexport import plugins
from smolexport.errors import MissingDependencyError, UsageError
from smolexport.sweep.driver import share
from smolexport.sweep.plan import SweepConfig, SweepSource, check_libraries, find_sources, pairs, tasks_of
from tests.cli.commands import tiny_checkpoint


def names(*checkpoints: str | Path) -> list[str]:
    return [source.name for source in find_sources([str(one) for one in checkpoints])]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """a/x, a/y and b/x are checkpoints."""
    made = tiny_checkpoint(tmp_path)
    for name in ("a/x", "a/y", "b/x"):
        shutil.copytree(made, tmp_path / "runs" / name)
    return tmp_path / "runs"


def test_names_are_as_short_as_they_can_be(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(runs / "a/x", runs / "a/y", "demo") == ["x", "y", "demo"]
    assert names(runs / "a/x", runs / "a/y", runs / "b/x") == ["a-x", "y", "b-x"]
    monkeypatch.chdir(runs / "a" / "x")
    assert names(".", "../y/", "../../b/x") == ["a-x", "y", "b-x"]


def test_a_hub_id_gives_its_name(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(runs / "a" / "y"))
    [hub, folder] = find_sources(["owner/x", str(runs / "b" / "x")])
    assert (hub.name, hub.folder, folder.name) == ("owner-x", runs / "a" / "y", "b-x")
    tasks = tasks_of([hub, folder], [("gguf", "int4")], SweepConfig(str(runs / "out")))
    assert [task.origin for task in tasks] == ["owner/x", str(runs / "b" / "x")], "a revision has its own folder"
    assert names("owner/x") == ["x"]


def test_a_checkpoint_that_is_not_there_is_an_error_of_its_own(runs: Path) -> None:
    [lost, found] = find_sources([str(runs / "nothing" / "here" / "at all"), str(runs / "a" / "x")])
    assert (lost.name, lost.folder, found.error) == ("at all", None, "")
    assert "no such folder" in lost.error


def test_a_checkpoint_is_named_once(runs: Path) -> None:
    (runs / "link").symlink_to(runs / "a" / "x")
    for again in (runs / "link", f"{runs}/a/x/", runs / "a" / ".." / "a" / "x"):
        with pytest.raises(UsageError, match=r"is the same checkpoint as .*name each once"):
            names(runs / "a" / "x", again)
    with pytest.raises(UsageError, match="the name of the checkpoint is empty"):
        names("")
    with pytest.raises(UsageError, match="name at least one"):
        names()


def test_every_format_and_scheme() -> None:
    found, lines = pairs(["onnx", "gguf"], ["int8", "int4"])
    assert found == [("onnx", "int8"), ("onnx", "int4"), ("gguf", "int8"), ("gguf", "int4")]
    assert lines == []
    assert [name for name, _ in pairs(None, ["int4"])[0]] == plugins.converters()


def test_schemes_that_a_format_has_not_are_left_out_and_said() -> None:
    found, lines = pairs(["gguf", "mlx", "onnx"], ["int4", "q4_k", "q4", "Q4-K-M"])
    assert found == [("gguf", "int4"), ("gguf", "q4_k_m"), ("mlx", "int4"), ("mlx", "q4"), ("onnx", "int4")]
    assert lines[:2] == ["mlx has no scheme q4_k: skipped", "onnx has no scheme q4_k: skipped"]
    assert "gguf has no scheme q4: skipped" in lines


def test_a_scheme_for_one_format() -> None:
    found, lines = pairs(["gguf", "onnx"], ["gguf:int8", "int4", "onnx:int4+f32"])
    assert (found, lines) == ([("gguf", "int8"), ("gguf", "int4"), ("onnx", "int4"), ("onnx", "int4+f32")], [])


@pytest.mark.parametrize(
    ("formats", "quants", "said"),
    [
        (["ggup"], ["int4"], "no converter for the format 'ggup'; installed: gguf"),
        (["gguf", "gguf"], ["int4"], "name each format once"),
        (["gguf", "mlx"], ["int4", "q44"], "--quant q44: none of gguf, mlx has such a scheme; `smolexport list`"),
        (["gguf"], ["q5"], "--quant q5: GGUF has no such scheme; did you mean"),
        (["gguf"], ["mlx:q4"], "--quant mlx:q4: the format 'mlx' is not one of those requested: gguf"),
        (["gguf"], ["gguf:q4"], "--quant q4: GGUF has no such scheme"),
        (["gguf"], ["int4", ""], "--quant : GGUF has no such scheme"),
    ],
)
def test_what_cannot_be(formats: list[str], quants: list[str], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        pairs(formats, quants)
    assert said in str(refused.value)


def test_outputs_go_into_no_checkpoint(tmp_path: Path) -> None:
    source = SweepSource("models/x", "x", tmp_path / "x")
    assert len(tasks_of([source], [("gguf", "int4")], SweepConfig(str(tmp_path / "out")))) == 1
    with pytest.raises(UsageError, match="cannot hold the outputs of models/x"):
        tasks_of([source], [("gguf", "int4")], SweepConfig(str(tmp_path)))
    with pytest.raises(UsageError, match="cannot hold the outputs of models/x"):
        tasks_of([source], [("gguf", "int4")], SweepConfig(str(tmp_path / "x")))
    with pytest.raises(UsageError, match="give another folder with -o"):
        tasks_of([SweepSource(".sweep", ".sweep", tmp_path / ".sweep")], [], SweepConfig(str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("cores", "jobs", "shares"),
    [
        ([2], None, (1, 2)),
        ([2], 2, (2, 1)),
        ([2], 5, (5, 1)),
        ([16], None, (4, 4)),
        ([16], 3, (3, 5)),
        ([8, 8], 1, (1, 8)),
        ([8, 32], None, (10, 4)),
        ([], None, (1, 1)),
    ],
)
def test_processors_are_shared(cores: list[int], jobs: int | None, shares: tuple[int, int]) -> None:
    assert share(cores, jobs) == shares


def test_a_comparison_needs_its_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "missing", lambda name: "needs x: pip install x" if name == "torch" else None)
    with pytest.raises(MissingDependencyError, match=r"the runtime .* needs x: pip install x; or pass --no-compare"):
        check_libraries(["gguf"], ray=False)
    monkeypatch.setattr(plugins, "missing", lambda name: None if name in ("torch", "onnxruntime_genai") else "needs y")
    check_libraries(["onnx"], ray=False)  # the second player of the format is there
    with pytest.raises(MissingDependencyError, match=r"llama\.cpp needs y"):
        check_libraries(["onnx", "gguf"], ray=False)

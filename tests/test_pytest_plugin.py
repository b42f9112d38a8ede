"""The pytest plugin in a project of its own: each test runs a real pytest in a child process."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import smolexport
from tests.cli.commands import environment

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "ci_parity"
PLUGIN = ("-p", "smolexport.testing.pytest_plugin", "-p", "no:cacheprovider")
OWN = """
def test_own(smolexport_comparison, smolexport_parity):
    good, bad = smolexport_comparison.candidates
    assert good.accuracy.kld.mean.value < bad.accuracy.kld.mean.value
    assert smolexport_parity("good.gguf") is good
    from smolexport import Thresholds
    assert smolexport_parity("good.gguf", thresholds=Thresholds(max_kld=0.0)).missed
"""
SHORT = "Some words of a text that is short enough to be scored at once, and long enough to say something. " * 6


def pytest_in(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run pytest as a project does that has smolexport and no other plugin."""
    if not any((folder / name).exists() for name in ("pytest.ini", "pyproject.toml")):
        (folder / "pytest.ini").write_text("[pytest]\n")  # otherwise pytest takes one from a folder further up
    env = environment({"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "COLUMNS": "200"})
    return subprocess.run(
        [sys.executable, "-m", "pytest", *PLUGIN, f"--rootdir={folder}", *argv],
        check=False, cwd=folder, capture_output=True, text=True, env=env, timeout=300,
    )  # fmt: skip


def with_rope(path: Path, theta: float) -> Path:
    """A copy of a GGUF that has another rope base: a fault that no checksum of the weights shows."""
    data = path.read_bytes()
    key = b"llama.rope.freq_base" + struct.pack("<I", 6)
    place = data.index(key) + len(key)
    other = path.with_name("bad.gguf")
    other.write_bytes(data[:place] + struct.pack("<f", theta) + data[place + 4 :])
    return other


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Path:
    """A good file, a bad one, a gate, a text and a test."""
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("project")
    good = smolexport.export("gguf", demo, folder / "good.gguf", quant="int8").path
    with_rope(good, 17.0)
    (folder / "parity.toml").write_text("[default]\nmax_kld = 9\n[int8]\nmax_kld = 0.02\nmin_top1 = 0.9\n")
    (folder / "words.txt").write_text(SHORT)
    (folder / "test_own.py").write_text(OWN)
    return folder


def options(*files: str) -> list[str]:
    return ["--smolexport-checkpoint=demo", "--smolexport-text=words.txt", *(f"--smolexport-file={f}" for f in files)]


def test_a_good_file_passes_and_a_bad_one_fails(project: Path) -> None:
    done = pytest_in(project, *options("good.gguf", "bad.gguf"), "-v", "-rA", "--junitxml=report.xml")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "smolexport: 2 files against demo, gate: " in done.stdout
    assert "PASSED smolexport::parity[good.gguf]" in done.stdout
    assert "FAILED smolexport::parity[bad.gguf] - " in done.stdout
    assert "PASSED test_own.py::test_own" in done.stdout
    assert "1 failed, 2 passed" in done.stdout
    assert "is above 0.02" in done.stdout
    assert "Traceback" not in done.stdout
    cases = {case.get("name"): case for case in ElementTree.parse(project / "report.xml").iter("testcase")}
    figures = {p.get("name"): float(str(p.get("value"))) for p in cases["parity[good.gguf]"].iter("property")}
    assert 0 < figures["kld"] < 0.02
    assert cases["parity[bad.gguf]"].find("failure") is not None


def test_a_file_that_cannot_be_opened_fails_alone(project: Path) -> None:
    (project / "broken.gguf").write_bytes((project / "good.gguf").read_bytes()[:3000])
    done = pytest_in(
        project, *options("broken.gguf", "good.gguf", "absent.gguf"), "-m", "smolexport", "--smolexport-max-windows=1"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 1 passed, 1 deselected" in done.stdout
    assert "absent.gguf: no such file" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_gate_by_name_and_a_name_given_twice(project: Path) -> None:
    (project / "strict.toml").write_text("[gguf]\nmax_kld = 0\n")
    done = pytest_in(
        project, *options("good.gguf", "good.gguf"), "-m", "smolexport", "--smolexport-gate=strict.toml", "-rf"
    )
    assert done.returncode == 1
    assert "good.gguf #1] - " in done.stdout
    assert "good.gguf #2] - " in done.stdout
    assert "2 failed" in done.stdout


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--smolexport-file=x.gguf"], "--smolexport-file needs --smolexport-checkpoint"),
        (["--smolexport-checkpoint=", "--smolexport-file=x"], "--smolexport-checkpoint is empty"),
        (["--smolexport-checkpoint=demo", "--smolexport-file="], "--smolexport-file is empty"),
    ],
)
def test_options_that_cannot_be(argv: list[str], said: str, tmp_path: Path) -> None:
    done = pytest_in(tmp_path, *argv)
    assert done.returncode == 4
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_gate_fails_each_file_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "parity.toml").write_text("[int8]\nmax_kdl = 1\n")
    done = pytest_in(tmp_path, "--smolexport-checkpoint=demo", "--smolexport-file=x.gguf")
    assert done.returncode == 1
    assert "[int8] max_kdl: is not a threshold, did you mean max_kld?" in done.stdout


def test_fixtures_without_what_they_need_fail_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(OWN)
    done = pytest_in(tmp_path)
    assert done.returncode == 1
    assert "this test needs --smolexport-checkpoint" in done.stdout
    done = pytest_in(tmp_path, "--smolexport-checkpoint=demo")
    assert "smolexport_comparison needs --smolexport-file" in done.stdout


def test_unused_it_costs_nothing_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_light.py").write_text(
        "import sys\n"
        "def test_light(request):\n"
        "    heavy = {'numpy', 'click', 'torch', 'numba', 'rich', 'smolexport.parity', 'smolexport.errors'}\n"
        "    assert 'smolexport.testing.pytest_plugin' in sys.modules\n"
        "    assert not heavy & set(sys.modules)\n"
        "    assert [item.name for item in request.session.items] == ['test_light']\n"
    )
    done = pytest_in(tmp_path, "-v", "--strict-markers", "-W", "error")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smolexport:" not in done.stdout
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert pytest_in(nothing).returncode == 5  # as without it: no tests


def test_pytest_finds_it_by_its_entry_point(tmp_path: Path) -> None:
    """As installed: nothing but the package's own metadata, and no -p."""
    declared = tomllib.loads((EXAMPLE.parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    info, project = tmp_path / "site" / "smolexport_here-1.dist-info", tmp_path / "project"
    info.mkdir(parents=True)
    project.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: smolexport-here\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pytest11]\n" + "".join(f"{n} = {m}\n" for n, m in declared.items()))
    (info / "RECORD").write_text("")
    env = environment({"PYTEST_ADDOPTS": ""})
    env["PYTHONPATH"] += f"{os.pathsep}{info.parent}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--help"],
        check=False, cwd=project, capture_output=True, text=True, env=env, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--smolexport-file" in done.stdout


def test_the_example_project(tmp_path: Path) -> None:
    """Every command of its workflow but the installing ones, as GitHub would run them, offline."""
    for name in ("torch", "llama_cpp", "onnxruntime"):
        pytest.importorskip(name)
    project, tools = tmp_path / "project", tmp_path / "tools"
    shutil.copytree(EXAMPLE, project)
    tools.mkdir()
    for name, module in (("pytest", f"pytest {' '.join(PLUGIN)}"), ("smolexport", "smolexport_cli")):
        script = tools / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        script.chmod(0o755)
    (tools / "smolexport_cli.py").write_text("from smolexport.cli import main\nmain()\n")
    job = yaml.safe_load((EXAMPLE / ".github" / "workflows" / "parity.yml").read_text())["jobs"]["parity"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert sum(command.startswith("pip install") for command in commands) == 2
    env = environment(
        {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "HF_HUB_OFFLINE": "1", **job["env"]}
    )
    env |= {"PATH": f"{tools}{os.pathsep}{env['PATH']}", "PYTHONPATH": f"{env['PYTHONPATH']}{os.pathsep}{tools}"}
    for command in commands:
        if not command.startswith("pip install"):
            done = subprocess.run(
                ["bash", "-e", "-c", command],
                check=False, cwd=project, env=env, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
    assert len(list(ElementTree.parse(project / "parity.xml").iter("testcase"))) == 5


def test_the_example_says_what_its_workflow_does() -> None:
    lines = (EXAMPLE / ".github" / "workflows" / "parity.yml").read_text().splitlines()
    readme = (EXAMPLE / "README.md").read_text()
    start = lines.index("      # the five lines") + 1
    for line in lines[start : start + 5]:
        assert line.strip() in readme

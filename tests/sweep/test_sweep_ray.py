"""Sweeps on a real Ray cluster, which a child process holds for all tests here."""

from __future__ import annotations

import importlib.util
import json
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolexport.conversion.pipeline import export
from tests.cli.commands import ROOT, assert_refused, call, environment, run
from tests.sweep.processes import gone, started, writer

CLUSTER = """
import sys, ray
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    """The password of all clusters here: Ray would keep one in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture(scope="module")
def address(token: None) -> Iterator[str]:
    """Of a cluster of two processors that ends with these tests."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CLUSTER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line, "Ray did not start"
        yield line


@needs_ray
def test_tasks_on_a_cluster(address: str, small: Path, other: Path, tmp_path: Path) -> None:
    """The same bytes as an export makes; one checkpoint is broken; what is done needs no cluster any more."""
    (other / "config.json").write_text("{")
    wish = (small, other, "--formats", "gguf,onnx", "-q", "int8", "-o", tmp_path / "out", "--no-compare", "--json")
    outcome = run("sweep", *wish, "--engine", "ray", "--address", address, "--jobs", "2")
    assert outcome.code == 1, outcome.err
    assert "2 at a time, 1 threads each" in outcome.err
    found = {(row["name"], row["format"]): row for row in json.loads(outcome.out)["tasks"]}
    for form in ("gguf", "onnx"):
        assert (found["small", form]["state"], found["other", form]["state"]) == ("new", "failed")
        assert "config.json: is not valid JSON" in found["other", form]["error"]
        done = export(form, small, tmp_path / f"alone-{form}", quant="int8", name="small")
        made = tmp_path / "out" / found["small", form]["path"]
        for file in done.files:
            assert (made if form == "gguf" else made / file.relative_to(done.path)).read_bytes() == file.read_bytes()
    local = call("sweep", *wish)
    assert [row["state"] for row in json.loads(local.out)["tasks"]] == ["kept", "kept", "failed", "failed"]
    kept = call("sweep", small, *wish[2:], "--engine", "ray", "--address", "127.0.0.1:1")
    assert (kept.code, "at a time" in kept.err) == (0, False), kept.err


@needs_ray
def test_a_killed_worker_loses_nothing(address: str, middling: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wish = ("--formats", "gguf", "-q", "iq4_nl", "--no-compare", "--engine", "ray", "--address", address, "--jobs", "2")
    with started(middling, *wish, "-o", out, "--json") as process:
        victim = writer(out)
        assert "ray::" in " ".join(victim.cmdline())
        victim.send_signal(signal.SIGKILL)
        printed, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "middling gguf iq4_nl: its process ended: " in err
    assert "; attempt 2\n" in err
    [row] = json.loads(printed)["tasks"]  # nothing of Ray's stands there
    assert row["state"] == "new"
    alone = export("gguf", middling, tmp_path / "alone.gguf", quant="iq4_nl", name="middling").path
    assert (out / row["path"]).read_bytes() == alone.read_bytes()
    assert [path.name for path in (out / "middling").iterdir()] == ["middling-iq4_nl.gguf"]


@needs_ray
def test_stopped_and_gone_on_in_a_cluster_of_its_own(middling: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the tasks and the cluster; the next sweep, without Ray, does what is left."""
    out = tmp_path / "out"
    wish = (middling, "--formats", "gguf", "-q", "int8,iq4_nl", "--no-compare", "--jobs", "1", "-o", out)
    with started(*wish, "--engine", "ray") as process:
        worker = writer(out, scheme="iq4_nl")
        process.send_signal(signal.SIGINT)
        printed, err = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, ""), err
    assert err.splitlines()[-1] == "smolexport: interrupted; nothing was left half-written"
    assert gone(worker)
    assert [path.name for path in out.rglob("*gguf*") if path.suffix != ".json"] == ["middling-int8.gguf"]
    again = call("sweep", *wish, "--json")
    assert [row["state"] for row in json.loads(again.out)["tasks"]] == ["kept", "new"], again.err


@needs_ray
def test_no_cluster_answers(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wish = ("sweep", small, "--no-compare", "-o", tmp_path / "out", "--engine", "ray")
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        assert_refused(call(*wish, "--address", address), f"--address {address}: no Ray cluster answers")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert_refused(call(*wish), "127.0.0.1:1: no Ray cluster answers")


def test_without_ray(small: Path, tmp_path: Path) -> None:
    """In a Python that cannot import it: refused before anything is read or written."""
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from smolexport.cli import main; main(['sweep', *sys.argv[1:], '--no-compare', '--engine', 'ray'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(small), "-o", str(tmp_path / "out")],
        check=False, capture_output=True, text=True, env=environment(), timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("smolexport: --engine ray: needs ray")
    assert line.endswith("pip install 'smolexport[ray]'")
    assert not (tmp_path / "out").exists()


def test_an_address_is_for_ray(small: Path, tmp_path: Path) -> None:
    refused = call("sweep", small, "-o", tmp_path / "out", "--address", "auto")
    assert_refused(refused, "--address auto: applies only to a Ray cluster; add --engine ray")

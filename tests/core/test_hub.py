"""Hub ids: small files first, weights only when nothing stands against the export, one line for every failure.

The hub itself is replaced at `snapshot_download`; which files match the patterns is decided by its own function.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smolexport.conversion import pipeline
from smolexport.conversion.prepare import prepare
from smolexport.errors import CheckpointError, ConfigError, UsageError
from smolexport.model.checkpoint import find_checkpoint
from tests.cli.commands import assert_refused, call, tiny_checkpoint

SINGLE = "model.safetensors"


class Hub:
    """One repository, the cache beside it, and the patterns of every download."""

    def __init__(self, repository: Path, snapshot: Path) -> None:
        self.repository, self.snapshot = repository, snapshot
        self.asked: list[list[str]] = []
        self.before_download: Callable[[bool], object] = lambda weights: None

    def download(
        self, repo: str, *, allow_patterns: list[str], ignore_patterns: list[str], local_files_only: bool, **_: Any
    ) -> str:
        if local_files_only:
            if not self.snapshot.exists():
                raise FileNotFoundError(repo)
            return str(self.snapshot)
        from huggingface_hub.utils._paths import filter_repo_objects

        self.asked.append(allow_patterns)
        self.before_download("*.safetensors" in allow_patterns)
        names = [p.relative_to(self.repository).as_posix() for p in self.repository.rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / name, self.snapshot / name)
        return str(self.snapshot)

    def edit(self, **changes: Any) -> None:
        path = self.repository / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    @property
    def has_weights(self) -> bool:
        return any(self.snapshot.rglob("*.safetensors"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tiny_checkpoint(tmp_path / "hub"), tmp_path / "cache" / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return hub


def test_export_asks_for_small_files_and_then_for_weights(hub: Hub) -> None:
    (hub.repository / "additional_chat_templates").mkdir()
    (hub.repository / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    seen: list[bool] = []
    hub.before_download = lambda weights: seen.append(hub.has_weights)
    outcome = call("gguf", "owner/name", "-q", "f16")
    assert (outcome.code, outcome.out) == (0, "name-f16.gguf\n")
    assert ["*.safetensors" in patterns for patterns in hub.asked] == [False, True]
    assert seen == [False, False], "the first download brought weights"
    assert (hub.snapshot / "additional_chat_templates" / "tools.jinja").exists()
    shutil.copytree(hub.repository, "name")
    assert call("gguf", "name", "-q", "f16", "-o", "local.gguf").code == 0
    assert Path("local.gguf").read_bytes() == Path("name-f16.gguf").read_bytes()


def test_dry_run_fetches_no_weights(hub: Hub) -> None:
    outcome = call("gguf", "owner/name", "-q", "q8_0", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert len(hub.asked) == 1
    assert not hub.has_weights
    shutil.copytree(hub.repository, "name")
    assert outcome.out == call("gguf", "name", "-q", "q8_0", "--dry-run").out


def test_dry_run_of_a_folder_checks_the_headers(hub: Hub) -> None:
    (hub.repository / SINGLE).write_bytes(b"")
    assert_refused(call("gguf", hub.repository, "--dry-run"), SINGLE, "is damaged")


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"model_type": "lama"}, [], "model_type 'lama' is not supported"),
        ({"vocab_size": 2**31 - 1}, [], "vocab_size 2147483647"),
        ({"vocab_size": 100}, [], "tokenizer.json"),
        ({}, ["-q", "q9_9"], "q9_9"),
        ({}, ["-q", "q4_k", "--strict"], "--strict"),
        ({}, ["-o", "taken.gguf"], "taken.gguf: exists already"),
        ({}, ["-o", "no/x.gguf"], "no such folder"),
        ({}, ["-o", "x" * 300], "File name too long"),
    ],
)
def test_refusals_come_before_the_weights(changes: dict[str, Any], options: list[str], said: str, hub: Hub) -> None:
    Path("taken.gguf").write_bytes(b"precious")
    hub.edit(**changes)
    assert_refused(call("gguf", "owner/name", *options), said)
    assert not any("*.safetensors" in patterns for patterns in hub.asked)
    assert not hub.has_weights
    assert Path("taken.gguf").read_bytes() == b"precious"


def test_a_vocabulary_without_weights_is_bounded_in_the_library_too(hub: Hub) -> None:
    hub.edit(vocab_size=2**31 - 1)
    with pytest.raises(ConfigError, match="download the checkpoint and give its folder"):
        prepare("gguf", "owner/name")


def test_headers_of_the_hub_are_matched(hub: Hub) -> None:
    hub.edit(intermediate_size=96)
    assert_refused(call("gguf", "owner/name", "-q", "f16"), "config.json asks for [96, 64]")
    assert list(Path().iterdir()) == []


def test_a_plan_without_weights_cannot_be_written(hub: Hub) -> None:
    job = prepare("gguf", "owner/name", quant="f16", weights=False)
    assert job.checkpoint is None
    with pytest.raises(UsageError, match="weights=False"):
        pipeline.write(job)
    assert list(Path().iterdir()) == []


def test_a_branch_that_moves_between_the_downloads(hub: Hub) -> None:
    def move(weights: bool) -> None:
        if weights:
            hub.snapshot = hub.snapshot.with_name("next")

    hub.before_download = move
    assert_refused(call("gguf", "owner/name"), "owner/name: changed on the hub during the download")


class ReadError(Exception):
    """As HTTP libraries have them (httpx.ReadError, ReadTimeout, ProxyError): neither OSError nor ValueError."""


FAILURES = [
    ReadError("connection reset\nby peer"),
    RuntimeError("xet: connection reset"),
]


def failing(error: Exception, *, weights_only: bool = False) -> Callable[[bool], None]:
    def fail(weights: bool) -> None:
        if weights or not weights_only:
            raise error

    return fail


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_a_connection_that_breaks(error: Exception, hub: Hub) -> None:
    hub.before_download = failing(error)
    said = str(error).splitlines()[0]
    assert_refused(call("gguf", "owner/name"), f"owner/name: no such folder, and the hub could not be read ({said})")


def test_the_cache_serves_when_the_connection_breaks(hub: Hub) -> None:
    shutil.copytree(hub.repository, hub.snapshot)
    hub.before_download = failing(ReadError("the read timed out"))
    assert find_checkpoint("owner/name") == hub.snapshot


def test_the_cache_fails_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ReadError("connection reset")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"the hub could not be read \(connection reset\)"):
        find_checkpoint("owner/name")


def test_weights_that_break_off_are_blamed_on_the_connection(hub: Hub) -> None:
    """The small files are in the cache by then; they must not pass for a checkpoint without weights."""
    hub.before_download = failing(ReadError("connection reset"), weights_only=True)
    assert_refused(call("gguf", "owner/name"), "the hub could not be read (connection reset)")


def test_other_errors_than_exceptions_pass(hub: Hub) -> None:
    def stop(weights: bool) -> None:
        raise KeyboardInterrupt

    hub.before_download = stop
    with pytest.raises(KeyboardInterrupt):
        find_checkpoint("owner/name")


def test_a_dtype_that_only_the_weights_tell(hub: Hub) -> None:
    """A config that claims none: the plan from the hub is that of the same folder on the disk."""
    from smolexport.testing.checkpoints import write_checkpoint

    size = json.loads((hub.repository / "config.json").read_text())["vocab_size"]
    write_checkpoint(hub.repository, "llama", dtype="f32", vocab_size=size)
    config = json.loads((hub.repository / "config.json").read_text())
    del config["torch_dtype"]
    (hub.repository / "config.json").write_text(json.dumps(config))
    remote = prepare("mlx", "owner/name", quant="q8_g32", name="x")
    local = prepare("mlx", hub.repository, quant="q8_g32", name="x")
    assert remote.plan.entries == local.plan.entries
    assert remote.plan.nbytes == local.plan.nbytes


def test_all_formats_are_refused_before_the_weights_too(hub: Hub) -> None:
    (Path("file")).write_text("x")
    for out, said in (("no/such", "no such folder"), ("file", "is not a folder")):
        assert_refused(call("all", "owner/name", "-o", out), said)
    assert hub.asked == []
    assert_refused(call("all", "owner/name", "-q", "q4_k_m"), "MLX has no such scheme")
    assert hub.asked == []
    assert call("all", "owner/name", "-o", "out").code == 0
    assert len(hub.asked) == 2
    assert "base_model: owner/name" in (Path("out") / "name-int4-mlx" / "README.md").read_text()

"""Conversations as calibration text: rendered as transformers renders them, and templates that hold nothing up."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolexport.calibration import collect
from smolexport.calibration.statistics import open_statistics
from smolexport.calibration.texts import training_windows
from smolexport.errors import UsageError
from smolexport.model.checkpoint import open_checkpoint
from smolexport.tokenizer import open_tokenizer, read_tokenizer
from tests.cli.commands import assert_refused, call, run, tiny_checkpoint

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "é", "parameters": {"type": "object"}}}
TOOLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% if enable_thinking %}<think>{% endif %}"
    "{{ mood }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
HOSTILE = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "no answer within 3 seconds",
    "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}": "OverflowError: Range too big",
    "{{ 'a' * 10**11 }}": "MemoryError: it takes more than 2 GiB",
}


def talk(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What is {number} times {number}?"},
        {"role": "assistant", "content": f"It is {number * number}."},
    ]


def written(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=1)


def with_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What processes were started for."""
    paths: list[Path] = []

    class Counted(collect.Renderer):
        def __init__(self, runtime: str, path: Path) -> None:
            paths.append(path)
            super().__init__(runtime, path)

    monkeypatch.setattr(collect, "Renderer", Counted)
    return paths


def test_the_demo_model_reads_conversations(demo: Path, tmp_path: Path) -> None:
    """All the way through the command line: the windows are those of transformers' own prompts."""
    path = written(tmp_path / "chats.jsonl", [{"messages": talk(i), "tools": None} for i in range(60)])
    done = run("calibrate", demo, "--text", path, "-o", tmp_path / "s", "--window", "64", "--tokens", "8192")
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path / 's'}\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    prompts = [tokenizer.apply_chat_template(talk(i), tokenize=False) for i in range(60)]
    assert "<|im_start|>assistant" in prompts[0]
    checkpoint = open_checkpoint(demo)
    spec = read_tokenizer(demo, checkpoint.spec.vocab_size)
    codec = open_tokenizer(demo, spec)
    ids = np.concatenate([codec.encode(prompt, frame=False) for prompt in prompts]).astype(np.int32)
    found = open_statistics(tmp_path / "s", checkpoint)
    expected = training_windows([ids], 64, 128, bos=spec.bos if spec.add_bos else None, seed=0)
    assert np.array_equal(found.windows(), expected)
    assert found.manifest.sources[0].tokens == len(ids)
    assert f"from chats.jsonl ({len(ids):,} tokens)" in done.err


def test_tools_and_switches(tmp_path: Path) -> None:
    """Every form in which the data sets for fine-tuning have them."""
    folder = with_template(tiny_checkpoint(tmp_path, num_hidden_layers=1), TOOLS)
    forms: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"tools": None, "chat_template_kwargs": None, "enable_thinking": None, "source": "x"}, {}),
        ({"tools": [TOOL]}, {"tools": [TOOL]}),
        ({"tools": json.dumps([TOOL, TOOL])}, {"tools": [TOOL, TOOL]}),
        ({"enable_thinking": True}, {"enable_thinking": True}),
        ({"chat_template_kwargs": {"enable_thinking": True, "mood": "gay"}}, {"enable_thinking": True, "mood": "gay"}),
        ({"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, {"enable_thinking": True}),
    ]
    path = written(tmp_path / "chats.jsonl", [{"messages": talk(i), **form} for i, (form, _) in enumerate(forms)])
    job = collect.open_collection(open_checkpoint(folder), tmp_path / "s", texts=[path], window=8, tokens=8192)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.apply_chat_template(talk(i), tokenize=False, **more) for i, (_, more) in enumerate(forms)]
    assert len({prompt.partition("<|im_start|>")[0] for prompt in prompts}) == 5
    spec = read_tokenizer(folder, 320)
    codec = open_tokenizer(folder, spec)
    ids = np.concatenate([codec.encode(prompt, frame=False) for prompt in prompts]).astype(np.int32)
    assert job.manifest.sources[0].tokens == len(ids)
    windows = collect.Statistics(job.folder, job.manifest).windows()
    assert np.array_equal(windows, training_windows([ids], 8, 1024, bos=spec.bos if spec.add_bos else None, seed=0))


def test_thousands_of_conversations_are_one_process(tiny: Path, tmp_path: Path, started: list[Path]) -> None:
    paths = [
        written(tmp_path / f"{name}.jsonl", [{"messages": talk(i)} for i in range(start, start + 1500)])
        for name, start in (("a", 0), ("b", 1500))
    ]
    ticks: list[int] = []
    options: dict[str, Any] = {"window": 64, "tokens": 1 << 18, "progress": ticks.append}
    job = collect.open_collection(open_checkpoint(tiny), tmp_path / "s", texts=paths, **options)
    assert started == [tiny]
    assert len(ticks) == 3000
    assert sum(ticks) == sum(source.tokens for source in job.manifest.sources)


def test_no_more_is_rendered_than_is_needed(tiny: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"messages": talk(i)} for i in range(3000)])
    ticks: list[int] = []
    collect.open_collection(
        open_checkpoint(tiny), tmp_path / "s", texts=[path], window=64, tokens=1024, progress=ticks.append
    )
    assert 1024 <= sum(ticks) < 1200


def test_texts_alone_start_no_process(tiny: Path, tmp_path: Path, started: list[Path]) -> None:
    path = written(tmp_path / "a.jsonl", [{"text": "The cat and the dog. " * 40}])
    collect.open_collection(open_checkpoint(tiny), tmp_path / "s", texts=[path], window=64, tokens=256)
    assert not started


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_templates(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolexport.run.chat.PATIENCE_S", 3.0)
    folder = with_template(tiny_checkpoint(tmp_path, num_hidden_layers=1), template)
    path = written(tmp_path / "chats.jsonl", [{"text": "The cat"}, {"messages": talk(1)}])
    start = time.monotonic()
    done = call("calibrate", folder, "--text", path, "-o", tmp_path / "s")
    assert time.monotonic() - start < 90
    assert_refused(done, f"{path}: line 2: the chat template fails on these messages: {HOSTILE[template]}")
    assert len(done.err) < 300 + len(str(path))
    assert not (tmp_path / "s").exists()


def test_a_template_that_refuses(tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    folder = with_template(tiny_checkpoint(tmp_path, num_hidden_layers=1), refusing)
    lines = [{"messages": talk(1)}, {"text": "x"}, {"messages": [{"role": "system", "content": "x"}]}]
    path = written(tmp_path / "chats.jsonl", lines)
    done = call("calibrate", folder, "--text", path, "-o", tmp_path / "s")
    assert_refused(done, f"{path}: line 3: the chat template fails on these messages: TemplateError: no system")
    assert len(done.err) < 300 + len(str(path))


def test_a_checkpoint_without_a_template(tmp_path: Path, started: list[Path]) -> None:
    folder = tiny_checkpoint(tmp_path, num_hidden_layers=1)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}))
    path = written(tmp_path / "chats.jsonl", [{"messages": talk(1)}])
    with pytest.raises(UsageError, match=r"chats\.jsonl: line 1: .*: the checkpoint has none"):
        collect.open_collection(open_checkpoint(folder), tmp_path / "s", texts=[path])
    assert not started


def test_the_runtime_of_checkpoints_is_asked(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first one by its name, which runs other files."""
    from smolexport import plugins

    names = plugins.runtimes()
    monkeypatch.setattr(plugins, "runtimes", lambda: sorted(names, reverse=True))
    assert plugins.checkpoint_runtime("open_chat").READS == "checkpoint"
    monkeypatch.setattr(plugins, "runtimes", lambda: [name for name in names if name != "torch"])
    with pytest.raises(plugins.MissingDependencyError, match="no installed runtime of checkpoints has open_chat"):
        plugins.checkpoint_runtime("open_chat")

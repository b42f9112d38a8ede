"""Chat templates in a process of their own: what transformers renders, and programs that would harm another one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from smolexport.run.chat import Renderer
from smolexport.testing.checkpoints import write_tokenizer
from tests.cli.commands import environment
from tests.tokenizers_for_tests import real_folder

transformers = pytest.importorskip("transformers")

TORCH = "smolexport_on_torch"
TALK = [{"role": "user", "content": 'What\'s 2+2?\n <b>&</b> "x" 😀'}, {"role": "assistant", "content": "4."}]
TOOL = {"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}" + "{% endfor %}" * 3
HOSTILE = {
    "a loop": (LOOP, "no answer within 2 seconds"),
    # one instruction of Python's, in which no other thread gets its turn
    "a power": ("{{ 10 ** (10 ** 8) }}", "no answer within 2 seconds"),
    "a text": ("{{ 'a' * 99999999999 }}", "MemoryError"),
    "a prompt": ("{{ 'a' * 30000000 }}", "a prompt of 30,000,000 characters"),
    "a way out": ("{{ cycler.__init__.__globals__.os.getpid() }}", "SecurityError"),
    "a colour": ("{{ raise_exception('\x1b[31m\n' ~ 'x' * 9999) }}", "TemplateError: \\x1b[31m xxx"),
    "no Jinja": ("{% for %}", "TemplateSyntaxError"),
}  # fmt: skip


def asked(messages: Any = TALK, tools: Any = None, **switches: Any) -> dict[str, Any]:
    return {"messages": messages, "tools": tools, "add_generation_prompt": False, "switches": switches}


def with_template(folder: Path, template: str) -> Path:
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolexport.run.chat.PATIENCE_S", 2.0)


@pytest.fixture(scope="module")
def smollm3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Renderer]]:
    """A real tokenizer as transformers reads it here, and the process that reads it too."""
    folder, _ = real_folder("smollm3", tmp_path_factory.mktemp("smollm3"))
    with Renderer(TORCH, folder) as process:
        yield transformers.AutoTokenizer.from_pretrained(folder), process


@pytest.mark.parametrize(
    "question",
    [
        asked(),
        asked(tools=[TOOL]),
        asked(tools=[]),
        asked(enable_thinking=False),
        asked([{"role": "system", "content": "/no_think é"}, *TALK, *TALK], xml_tools=[TOOL], enable_thinking=True),
        {**asked(TALK[:1]), "add_generation_prompt": True},
    ],
)
def test_texts_are_those_of_transformers(question: dict[str, Any], smollm3: tuple[Any, Renderer]) -> None:
    tokenizer, process = smollm3
    expected = tokenizer.apply_chat_template(
        question["messages"], tools=question["tools"], add_generation_prompt=question["add_generation_prompt"],
        tokenize=False, **question["switches"],
    )  # fmt: skip
    answer = process.ask(question, ids=False)
    assert (answer.text, answer.ids, answer.error) == (expected, (), "")
    ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert process.ask(question).ids == process.ask({"text": expected}).ids == tuple(ids)


def test_a_refusal_is_an_answer(smollm3: tuple[Any, Renderer]) -> None:
    _, process = smollm3
    for question in (asked("x"), asked(tokenize=True), {"messages": TALK}):
        assert process.ask(question, ids=False).error
    assert not process.ask(asked(), ids=False).error, "the process is there still"
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert process.ask(asked(deep)).error == "nested too deeply"
    half = process.ask(asked([{"role": "user", "content": "\ud83d"}]), ids=False)
    assert "\ud83d" in half.text


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.usefixtures("impatient")
def test_hostile_templates(kind: str, tmp_path: Path) -> None:
    template, said = HOSTILE[kind]
    with Renderer(TORCH, with_template(tmp_path, template)) as process:
        start = time.monotonic()
        first = process.ask(asked())
        assert time.monotonic() - start < 15
        assert said in first.error
        assert first.error.isprintable()
        assert len(first.error) < 200
        again = process.ask({"text": "The cat"})
        assert first.lost == again.lost == ("no answer" in said)
        assert again.error == first.error if again.lost else again.ids


def test_one_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with Renderer(TORCH, tmp_path) as process:
        answer = process.ask(asked())
    assert answer.lost
    assert str(tmp_path) in answer.error
    with Renderer("smolexport_on_nothing", tmp_path) as process:
        assert process.ask(asked()).error == "ModuleNotFoundError: No module named 'smolexport_on_nothing'"


def test_nothing_is_left_running(tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(KeyError), Renderer(TORCH, with_template(tmp_path, LOOP)):  # noqa: PT012
        assert set(psutil.Process().children()) - before
        raise KeyError
    assert not set(psutil.Process().children()) - before


def test_the_clock_runs_where_nobody_waits(tmp_path: Path) -> None:
    """Whoever asked may be killed in the middle of an endless template."""
    code = (
        "import sys, pathlib\nfrom smolexport.run import chat\nchat.PATIENCE_S = 4.0\n"
        f"process = chat.Renderer({TORCH!r}, pathlib.Path(sys.argv[1]))\nprint(process._process.pid, flush=True)\n"
        f"process.ask({asked()!r})"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(with_template(tmp_path, LOOP))], stdout=subprocess.PIPE, env=environment()
    )
    with parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.5)
        parent.send_signal(signal.SIGKILL)
    child.wait(20)  # raises where it goes on
    assert parent.returncode == -signal.SIGKILL


@pytest.mark.parametrize("module", ["json", "transformers", "smolexport_on_torch"])
def test_nothing_is_imported_from_the_working_folder(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may stand in the folder of a stranger's checkpoint."""
    folder = with_template(tmp_path / "model", "{{ messages[0].content }}")
    (folder / f"{module}.py").write_text("open('was-here', 'w')")
    monkeypatch.chdir(folder)
    with Renderer(TORCH, Path()) as process:
        assert process.ask(asked([{"role": "user", "content": "x"}]), ids=False).text == "x"
    assert not Path("was-here").exists()


def test_peak_memory_imports_nothing_from_there_either(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smolexport import plugins
    from smolexport.parity import peak_memory
    from smolexport.parity.inputs import Candidate

    (tmp_path / "argparse.py").write_text("open('was-here', 'w')")
    monkeypatch.chdir(tmp_path)
    found, reason = peak_memory.measure_peak(Candidate(demo, "checkpoint", "bf16", plugins.runtime("torch"), 0, 16.0))
    assert found, reason
    assert not Path("was-here").exists()

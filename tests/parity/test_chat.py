"""Tokenizers and chat templates on the real libraries, against the checkpoint's own."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from smolexport import plugins
from smolexport.conversion.pipeline import export
from smolexport.errors import TokenizerError
from smolexport.parity import chat
from smolexport.parity.candidates import exported
from smolexport.parity.chat import TEXTS, conversations
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from tests.tokenizers_for_tests import real_folder

pytestmark = pytest.mark.skipif(
    any(plugins.missing(name) for name in ("torch", "llamacpp", "mlx", "onnxruntime")),
    reason="a runtime is not installed",
)
SCHEMES = {"gguf": "q8_0", "mlx": "q8", "onnx": "int8"}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3
BOMB = "{{ 'a' * 99999999999 }}"
BREAKOUT = "{{ cycler.__init__.__globals__.os.getpid() }}"


def ask(expected, path, runtime=None):
    """All checks of one exported file, by name."""
    [candidate] = exported([path], None, [runtime] if runtime else [])
    with candidate.runtime.open(candidate.path, threads=1, context=64) as session:
        return {one.name: one for one in chat.check(expected, candidate, session)}


def apart(checks):
    return {name for name, one in checks.items() if one.equal is False}


def with_template(folder: Path, source: Path, template: str) -> Path:
    """A copy of a checkpoint that has another chat template."""
    shutil.copytree(source, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return write_checkpoint(folder / "model", "llama", tokenizer=write_tokenizer(folder / "tok"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def expected(tiny):
    return chat.expect(tiny)


@pytest.fixture(scope="module")
def expected_of_demo(demo):
    return chat.expect(demo)


@pytest.mark.parametrize("kind", SCHEMES)
def test_the_demo_model_is_read_alike_everywhere(kind, demo, expected_of_demo, tmp_path):
    path = export(kind, demo, tmp_path / f"x{plugins.converter(kind).SUFFIX}", quant=SCHEMES[kind]).path
    expected = expected_of_demo
    checks = ask(expected, path)
    assert list(checks) == list(expected.questions)
    names = {f"text {name}" for name in TEXTS}
    assert set(checks) >= names | {"text added tokens", "prompt", "chat user", "chat system"}
    assert apart(checks) == set()
    assert all(one.equal and not one.difference for one in checks.values())
    means = {one.means for name, one in checks.items() if name.startswith("chat ")}
    assert means == {"transformers on the folder's files" if kind == "onnx" else ""}


def test_genai_answers_for_itself(tiny, expected, tmp_path):
    pytest.importorskip("onnxruntime_genai")
    path = export("onnx", tiny, tmp_path / "x-onnx", quant="f32").path
    checks = ask(expected, path, "onnxruntime-genai")
    assert checks["text english"].equal
    assert checks["chat user"].equal
    assert {one.means for one in checks.values()} == {""}


def test_an_edited_template_is_found_and_shown(tiny, expected, tmp_path):
    path = export("gguf", tiny, tmp_path / "x.gguf", quant="f32").path
    assert apart(ask(expected, path)) == set()
    data = path.read_bytes()
    assert data.count(b"'<|im_end|>\n'") == 1
    path.write_bytes(data.replace(b"'<|im_end|>\n'", b"'<|im_end|>\t'"))
    checks = ask(expected, path)
    assert apart(checks) == {name for name in expected.questions if name.startswith("chat ")}
    difference = checks["chat system"].difference
    assert difference.splitlines()[:2] == ["--- checkpoint", "+++ file"]
    assert "<|im_end|>\\t" in difference
    assert len(difference.splitlines()) <= 13
    said = chat.note(list(checks.values()))
    assert said.startswith(f"4 of {len(checks) - 1} texts and chats differ from the checkpoint's: chat user, ")
    assert "\n" not in said


def test_an_edited_tokenizer_is_found_by_its_ids(tiny, expected, tmp_path):
    path = export("mlx", tiny, tmp_path / "x-mlx", quant="bf16").path
    document = json.loads((path / "tokenizer.json").read_text())
    merges = document["model"]["merges"]
    document["model"]["merges"] = merges[: len(merges) // 2]
    (path / "tokenizer.json").write_text(json.dumps(document))
    checks = ask(expected, path)
    assert "text english" in apart(checks)
    assert "same text, different ids from token" in checks["text english"].difference


def test_a_file_without_a_template(tiny, expected, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "bare")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}))
    assert not [name for name in chat.expect(folder).questions if name.startswith("chat ")]
    checks = ask(expected, export("gguf", folder, tmp_path / "x.gguf", quant="f32").path)
    assert "holds no tokenizer.chat_template" in checks["chat user"].difference
    assert checks["text english"].equal


@pytest.mark.parametrize("kind", ["gguf", "mlx"])
def test_a_template_that_never_ends_is_ended(kind, tiny, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("smolexport.run.chat.PATIENCE_S", 3.0)
    folder = with_template(tmp_path / "loop", tiny, LOOP)
    path = export(kind, folder, tmp_path / f"x{plugins.converter(kind).SUFFIX}", quant="bf16").path
    start = time.monotonic()
    checks = ask(expected, path)
    assert time.monotonic() - start < 100
    assert "no answer within 3 seconds" in checks["chat user"].difference
    assert "not asked because 'chat user' failed: no answer" in checks["chat system"].difference
    assert checks["text english"].equal
    if kind == "gguf":  # the same in the checkpoint: nothing can be said
        both = ask(chat.expect(folder), path)
        assert both["chat user"].equal is None
        assert both["text english"].equal


@pytest.mark.parametrize("kind", ["gguf", "mlx"])
@pytest.mark.parametrize(("template", "said"), [(BOMB, "MemoryError"), (BREAKOUT, "SecurityError")])
def test_templates_stay_in_their_box(kind, template, said, tiny, expected, tmp_path):
    folder = with_template(tmp_path / "bad", tiny, template)
    path = export(kind, folder, tmp_path / f"x{plugins.converter(kind).SUFFIX}", quant="bf16").path
    checks = ask(expected, path)
    assert checks["chat user"].equal is False
    assert said in checks["chat user"].difference
    assert checks["text english"].equal


def test_a_conversation_that_all_refuse_is_no_difference(tiny, tmp_path):
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    folder = with_template(tmp_path / "refusing", tiny, refusing)
    expected = chat.expect(folder)
    assert "no system" in expected.answers["chat system"].error
    path = export("gguf", folder, tmp_path / "x.gguf", quant="f32").path
    assert apart(ask(expected, path)) == set()
    other = export("gguf", tiny, tmp_path / "y.gguf", quant="f32").path
    assert "no system" in ask(expected, other)["chat system"].difference


def test_a_tokenizer_that_cannot_be_read(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        chat.expect(folder)
    found, said = chat.ask(folder)
    assert found is None
    assert "were not compared: " in said


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A checkpoint with a real tokenizer and tiny weights, and what is expected of it; each made once."""
    made = {}

    def real(name, model_type):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            tokens, size = real_folder(name, folder / "tok")
            (tokens / "config.json").unlink(missing_ok=True)
            model = write_checkpoint(
                folder / "model", model_type, tokenizer=tokens, hidden_size=32, intermediate_size=32,
                num_hidden_layers=4 if model_type == "smollm3" else 1, vocab_size=size,
            )  # fmt: skip
            made[name] = model, chat.expect(model)
        return made[name]

    return real


@pytest.mark.parametrize(
    ("name", "model_type", "kind", "differing"),
    [
        ("smollm3", "smollm3", "gguf", set()),
        ("smollm3", "smollm3", "mlx", set()),
        ("smollm2", "llama", "gguf", set()),
        # llama.cpp composes no marks, and takes </s> for a special token in any vocabulary
        ("qwen3", "qwen3", "gguf", {"text marks", "text special"}),
    ],
)
def test_real_templates(name, model_type, kind, differing, real, tmp_path):
    """Thinking on and off, tools as JSON and as Python, tool calls: all as the checkpoint writes them."""
    folder, expected = real(name, model_type)
    path = export(kind, folder, tmp_path / f"x{plugins.converter(kind).SUFFIX}", quant="bf16").path
    assert not [answer.error for answer in expected.answers.values() if answer.error]
    if name != "smollm2":
        on, off = (expected.answers[f"chat thinking {state}"].text for state in ("on", "off"))
        assert on != off
        assert "get_weather" in expected.answers["chat tool call"].text
    assert apart(ask(expected, path)) == differing


def test_questions_follow_the_template():
    assert len(conversations("")) == 4
    assert set(conversations("tools")) - set(conversations("")) == {"tools", "tool call", "tool call, answered"}
    assert len([name for name in conversations("enable_thinking") if name.startswith("thinking")]) == 4
    assert "xml_tools" in conversations("{% if xml_tools %}")
    assert conversations("xml_tools")["xml_tools"]["tools"] is None

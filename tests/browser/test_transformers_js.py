"""An exported folder in Transformers.js, in node and in Chromium: the same greedy tokens as our own loop's.

The WebAssembly build of ONNX Runtime knows no 8-bit activations and computes as at `accuracy_level` 0, whatever the
graph asks for.  What Chromium writes is therefore held against an export with that level.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import smolexport_on_onnxruntime as onnxruntime_runtime
from smolexport import Generation, export
from smolexport.run.generate import generate
from tests.browser.node_for_tests import chat_page, generated, needs_chromium, needs_node, refused, served

pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

PROMPT = "The old house stood"
TOKENS = 40
DTYPES = {"q4": "int4", "int8": "int8", "q8": "int8-dynamic", "fp32": "f32"}  # Transformers.js' name -> ours


@pytest.fixture(scope="module")
def folder(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, four schemes in one folder, as exported by default."""
    out = tmp_path_factory.mktemp("transformers_js") / "demo"
    export("onnx", demo, out, quant="+".join(DTYPES.values()))
    return out


@pytest.fixture(scope="module")
def exact(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with float activations."""
    out = tmp_path_factory.mktemp("transformers_js") / "exact"
    export("onnx", demo, out, quant="+".join(DTYPES.values()), options={"accuracy_level": 0})
    return out


def ours(folder: Path, scheme: str, prompt: str | list[int] = PROMPT) -> Generation:
    session = onnxruntime_runtime.open(folder, graph=scheme, threads=1, spinning=False)
    try:
        return generate(session, prompt, max_tokens=TOKENS)
    finally:
        session.close()


def changed(folder: Path, out: Path, name: str, values: dict[str, object]) -> Path:
    """A copy of `folder` in which these keys of a JSON file have other values; None removes one."""
    shutil.copytree(folder, out)
    found = json.loads((out / name).read_text("utf-8")) | values
    (out / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}), "utf-8")
    return out


@needs_node
@pytest.mark.parametrize("dtype", DTYPES)
def test_node_chooses_our_tokens(folder: Path, dtype: str) -> None:
    expected = ours(folder, DTYPES[dtype])
    found = generated(folder, dtype=dtype, prompt=PROMPT, max_tokens=TOKENS)
    assert found["tokens"] == list(expected.tokens)
    assert found["text"] == expected.text


@needs_node
@pytest.mark.parametrize("dtype", ["q4", "int8"])
def test_node_chooses_our_tokens_with_float_activations(exact: Path, dtype: str) -> None:
    found = generated(exact, dtype=dtype, prompt=PROMPT, max_tokens=TOKENS)
    assert found["tokens"] == list(ours(exact, DTYPES[dtype]).tokens)


@needs_node
def test_node_stops_where_generation_config_says(folder: Path, tmp_path: Path) -> None:
    free = ours(folder, "int4")
    stop = free.tokens[7]
    ending = changed(folder, tmp_path / "ending", "generation_config.json", {"eos_token_id": [0, stop]})
    found = generated(ending, dtype="q4", prompt=PROMPT, max_tokens=TOKENS)
    assert found["tokens"] == list(ours(ending, "int4").tokens) == list(free.tokens[: free.tokens.index(stop) + 1])
    assert found["reason"] == "stop"


@needs_node
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_node_renders_the_chat_template(folder: Path, tmp_path: Path, place: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the torch extra is not installed")
    chat = [{"role": "user", "content": "Who lives in the old house?"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
    if place == "chat_template.jinja":
        template = tokenizer.chat_template
        folder = changed(folder, tmp_path / "jinja", "tokenizer_config.json", {"chat_template": None})
        (folder / place).write_text(template, "utf-8")
    found = generated(folder, dtype="q4", chat=chat[0]["content"], max_tokens=TOKENS)
    assert found["promptTokens"] == expected
    assert found["tokens"] == list(ours(folder, "int4", expected).tokens)


@needs_node
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "onnx/model_q4.onnx"])
def test_node_says_which_file_is_missing(folder: Path, tmp_path: Path, name: str) -> None:
    broken = tmp_path / "with a space, and v1.0"
    shutil.copytree(folder, broken)
    assert generated(broken, dtype="q4", prompt=PROMPT, max_tokens=1)["tokens"]
    (broken / name).unlink()
    assert refused("generate.mjs", broken, "--prompt", PROMPT, code=1).startswith(f"The folder has no {name}")


@needs_chromium
@pytest.mark.parametrize("dtype", DTYPES)
def test_chromium_writes_what_our_loop_writes(folder: Path, exact: Path, dtype: str) -> None:
    with served(folder) as port:
        found = chat_page(port, dtype=dtype, mode="text", prompts=[PROMPT], tokens=TOKENS)
    [turn] = found["turns"]
    assert (turn["kind"], turn["text"]) == ("text", ours(exact, DTYPES[dtype]).text)
    assert turn["note"].startswith(f"{TOKENS} tokens · ")
    assert " tokens/s · " in turn["note"]
    assert found["offered"] == list(DTYPES)
    assert found["hosts"] == [f"localhost:{port}"]  # nothing from anywhere else
    assert (found["isolated"], found["complaints"]) == (True, [])


@needs_chromium
def test_chromium_chats_in_turns(exact: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the torch extra is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exact)
    chat: list[dict[str, str]] = []
    expected = []
    questions = ["Who lives in the old house?", "And where is he now?"]
    for question in questions:
        chat.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        chat.append({"role": "assistant", "content": ours(exact, "int4", list(ids)).text})
        expected += [("user", question), ("assistant", chat[-1]["content"])]
    with served(exact) as port:
        found = chat_page(port, dtype="q4", mode="chat", prompts=questions, tokens=TOKENS)
    assert [(turn["kind"], turn["text"]) for turn in found["turns"]] == expected


@needs_chromium
def test_chromium_stops_when_told(folder: Path) -> None:
    with served(folder) as port:
        found = chat_page(port, dtype="fp32", mode="text", prompts=[PROMPT], tokens=900, stopAfter=20)
    [turn] = found["turns"]
    assert turn["note"].endswith(" · stopped")
    assert len(turn["text"]) > 20
    assert int(turn["note"].split()[0]) < 900


@needs_chromium
def test_chromium_says_which_file_is_missing(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "onnx" / "model_int8.onnx_data").unlink()
    with served(broken) as port:
        found = chat_page(port, dtype="int8", mode="text", prompts=[PROMPT], tokens=4)
    [turn] = found["turns"]
    assert turn["kind"] == "error"
    assert turn["text"].startswith("The folder has no onnx/model_int8.onnx_data.")

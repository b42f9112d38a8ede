"""A tokenizer that puts EOS behind every text: what each reader of an output makes of a prompt, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smolexport import plugins
from smolexport.conversion.pipeline import export
from smolexport.parity import chat
from smolexport.parity.candidates import exported
from tests.browser.node_for_tests import generated, needs_node, pipeline_prompt
from tests.cases_for_tests import made_case
from tests.vocab_only import LlamaVocab

SCHEMES = {"gguf": "q8_0", "mlx": "q8", "onnx": "int8"}
TEXT = "Once upon a time"
BARE = [49, 2033, 539, 261, 570]
BOS, EOS = 1, 2

pytestmark = pytest.mark.skipif(
    any(plugins.missing(name) for name in ("torch", "llamacpp", "mlx", "onnxruntime", "onnxruntime_genai")),
    reason="a runtime is not installed",
)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_case("76", tmp_path_factory.mktemp("76") / "model")


@pytest.fixture(scope="module")
def outputs(case: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("outputs")
    return {
        kind: export(kind, case, folder / f"x{plugins.converter(kind).SUFFIX}", quant=scheme)
        for kind, scheme in SCHEMES.items()
    }


def prompt(runtime: str, path: Path) -> list[int]:
    return plugins.runtime(runtime).open_chat(path).encode(TEXT, framed=True)


def said(job: Any, *words: str) -> bool:
    return any(all(word in note for word in words) for note in job.plan.notes)


def test_llamacpp_ends_no_prompt(outputs: dict[str, Any]) -> None:
    """Its perplexity and imatrix abort where a file asks for EOS."""
    from smolexport_on_llamacpp._library import Model

    job = outputs["gguf"]
    assert prompt("llamacpp", job.path) == [BOS, *BARE]
    model = Model(job.path, 0, vocab_only=True)
    vocab = LlamaVocab(model.lib, model.vocab)
    assert (vocab.ask("get_add_bos"), vocab.ask("get_add_eos")) == (True, False)
    model.close()
    assert said(job, "ends every text with <|im_end|>", "add_eos_token false")


def test_mlx_lm_ends_a_prompt_and_the_note_says_so(outputs: dict[str, Any], case: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    job = outputs["mlx"]
    model, tokenizer = mlx_lm.load(str(job.path))
    [reply] = mlx_lm.stream_generate(model, tokenizer, TEXT, max_tokens=1)
    assert reply.prompt_tokens == len([BOS, *BARE, EOS])
    assert prompt("mlx", job.path) == prompt("torch", job.path) == prompt("torch", case) == [BOS, *BARE, EOS]
    assert said(job, "'<|im_end|>' after", "mlx_lm.generate and transformers")


def test_genai_adds_nothing_and_the_note_says_so(outputs: dict[str, Any]) -> None:
    job = outputs["onnx"]
    assert prompt("onnxruntime_genai", job.path) == BARE
    assert said(job, "'<|im_start|>' before and '<|im_end|>' after", "GenAI only with add_special_tokens")


@needs_node
@pytest.mark.parametrize("asked", [False, True])
def test_transformers_js_as_the_note_says(asked: bool, case: Path, outputs: dict[str, Any], tmp_path: Path) -> None:
    path = outputs["onnx"].path
    notes = outputs["onnx"].plan.notes
    if asked:
        file = case.parent / "asked" / "tokenizer_config.json"
        file.parent.mkdir()
        for source in case.iterdir():
            (file.parent / source.name).write_bytes(source.read_bytes())
        file.write_text(json.dumps({**json.loads(file.read_text()), "add_bos_token": True}))
        job = export("onnx", file.parent, tmp_path / "asked-onnx", quant="int8")
        path, notes = job.path, job.plan.notes
    found = pipeline_prompt(path, dtype="int8", prompt=TEXT)
    assert found == {"tokenizer": [BOS, *BARE, EOS], "pipeline": [BOS, *BARE, EOS] if asked else BARE}
    assert any(f"its text-generation pipeline {'too' if asked else 'does not'}," in note for note in notes)


@needs_node
def test_the_browser_example_goes_on_with_the_prompt(outputs: dict[str, Any]) -> None:
    found = generated(outputs["onnx"].path, dtype="int8", prompt=TEXT, max_tokens=2)
    assert found["promptTokens"] == [BOS, *BARE]


@pytest.mark.parametrize(
    ("kind", "runtime", "note"),
    [
        ("gguf", "llamacpp", ""),
        ("mlx", "mlx", "the runtime ends a prompt with '<|im_end|>'"),
        ("onnx", "onnxruntime", ""),
        ("onnx", "onnxruntime_genai", "the runtime begins a prompt with nothing instead of '<|im_start|>'"),
    ],
)
def test_compare_says_what_stands_around_a_prompt(
    kind: str, runtime: str, note: str, outputs: dict[str, Any], asked: tuple[chat.Expected, str]
) -> None:
    expected, told = asked
    assert told == "transformers ends a prompt with '<|im_end|>'"
    [candidate] = exported([outputs[kind].path], None, [runtime])
    with candidate.runtime.open(candidate.path, threads=1, context=64) as session:
        checks = chat.check(expected, candidate, session)
    assert chat.note([one for one in checks if not one.name.startswith("chat ")]) == note
    [check] = [one for one in checks if one.name == "prompt"]
    assert check.equal is not bool(note)


@pytest.fixture(scope="module")
def asked(case: Path) -> tuple[chat.Expected | None, str]:
    return chat.ask(case)

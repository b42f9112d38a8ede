"""The small files of an ONNX folder: what each reader looks for, and where it looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import smolexport
from smolexport.testing.checkpoints import CHAT_TEMPLATE, write_checkpoint, write_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    return write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer, num_hidden_layers=1)


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (content | values).items() if v is not None}))


def exported(source: Path, **options: Any) -> tuple[smolexport.Export, dict[str, Any], dict[str, Any]]:
    done = smolexport.export("onnx", source, source.parent / "out", force=True, **options)
    config, generation = ("config.json", "genai_config.json")
    return done, json.loads((done.path / config).read_text()), json.loads((done.path / generation).read_text())


def test_tokenizer_files_are_copied_byte_for_byte(source: Path) -> None:
    done, _, _ = exported(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (done.path / name).read_bytes() == (source / name).read_bytes()


def test_a_chat_template_is_put_where_a_browser_looks(source: Path) -> None:
    change(source / "tokenizer_config.json", chat_template=None, tokenizer_class="TokenizersBackend")
    (source / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    done, _, _ = exported(source)
    made = json.loads((done.path / "tokenizer_config.json").read_text())
    assert (made["chat_template"], made["tokenizer_class"]) == (CHAT_TEMPLATE, "PreTrainedTokenizerFast")
    assert (done.path / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert any("the chat template was added" in note for note in done.plan.notes)


def test_how_to_sample_and_when_to_stop(source: Path) -> None:
    change(source / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[2, 0])
    change(source / "config.json", eos_token_id=[2, 0])
    _, config, generation = exported(source)
    assert config["eos_token_id"] == [2, 0]
    assert generation["model"]["eos_token_id"] == [2, 0]
    found = generation["search"]
    assert {key: found[key] for key in ("do_sample", "temperature", "top_p")} == {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9,
    }  # fmt: skip
    change(source / "generation_config.json", do_sample=False)
    _, _, generation = exported(source)
    assert generation["search"] == {"max_length": 512, "past_present_share_buffer": True, "do_sample": False}


def test_what_names_a_place_is_dropped(source: Path) -> None:
    change(source / "config.json", _name_or_path="somewhere")
    _, config, _ = exported(source, ignore_config=("_name_or_path",))
    assert "_name_or_path" not in config
    assert config["transformers.js_config"] == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}}


def test_the_card_carries_licence_and_tells_how_to_run_it(source: Path) -> None:
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [no]\n---\n# Mine\n")
    done, _, _ = exported(source, quant="f16+f32")
    text = (done.path / "README.md").read_text()
    assert "license: apache-2.0\n" in text
    assert "library_name: transformers.js\n" in text
    assert 'dtype: "fp16"' in text
    assert "og.Model(" in text

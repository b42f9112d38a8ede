"""Tokens that readers of an ONNX folder find otherwise than tokenizer.json says, and what the notes say about them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from smolexport.conversion.pipeline import export
from tests.browser.node_for_tests import encoded, no_node

og = pytest.importorskip("onnxruntime_genai")
tokenizers = pytest.importorskip("tokenizers")

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
FIRST = 4000  # id of the first token that is made an added one
COMPOSED, APART = "<\u00e9\u00e1>", "<e\u0301a\u0301>"
CASES: dict[str, tuple[dict[str, dict[str, bool]], bool, list[str], str, str]] = {
    # added tokens, whether the tokenizer composes, texts, the readers that differ in the first text, the note
    "lstrip": ({"<m>": {"lstrip": True}}, False, ["a <m>", "a<m>"], "genai", "'<m>' stays a token of its own in ONNX"),
    "rstrip": ({"<m>": {"rstrip": True}}, False, ["<m> a", "<m>a"], "", ""),
    "single word": ({"xyz": {"single_word": True}}, False, ["axyzb", "a xyz b"], "genai js", "'xyz' within words too"),
    "nul": ({"<\0>": {}}, False, ["a<\0>b", "ab"], "genai", r"it never finds '<\x00>'"),
    "composed": ({COMPOSED: {}}, True, [APART, COMPOSED], "genai js", "finds the decomposed form too"),
    "apart": ({APART: {"normalized": True}}, True, [COMPOSED, APART], "genai", "ONNX Runtime GenAI only this one"),
    "plain nfc": ({}, True, ["e\u0301", "\u00e9"], "genai", "does not: text with decomposed accents differs"),
    "passes": ({"<e>": {}, "<e>x": {"normalized": True}}, False, ["<e>x", "<e> x"], "genai js", "the tokenizer '<e>'"),
    "one pass": ({"<e>": {}, "<e>x": {}}, False, ["<e>x", "<e> x"], "", ""),
}


@pytest.fixture(scope="module")
def made(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """The exports of all cases with their notes, by name."""
    root, found = tmp_path_factory.mktemp("tokens"), {}
    for name, (added, composes, *_) in CASES.items():
        folder = shutil.copytree(demo, root / name)
        document = json.loads((folder / "tokenizer.json").read_text())
        edited(document, added, composes)
        (folder / "tokenizer.json").write_text(json.dumps(document))
        job = export("onnx", folder, root / f"{name}-onnx", quant="int8")
        found[name] = job.path, job.plan.notes
    return found


def edited(document: dict[str, Any], added: dict[str, dict[str, bool]], composes: bool) -> None:
    """The last words of the vocabulary, which others are not built from, become the added tokens."""
    model = document["model"]
    parts = {part for pair in model["merges"] for part in pair}
    free = [text for text in reversed(model["vocab"]) if text not in parts and len(text) > 2][: len(added)]
    for (text, flags), old in zip(added.items(), free, strict=True):
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) != old]
        index = model["vocab"].pop(old)
        model["vocab"][text] = index
        document["added_tokens"].append({"id": index, "content": text, **FLAGS, **flags})
    document["added_tokens"].sort(key=lambda token: token["id"])
    document["normalizer"] = {"type": "NFC"} if composes else None


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reader", ["genai", "js"])
def test_readers_differ_where_the_notes_say(reader: str, name: str, made: dict[str, Any]) -> None:
    _, _, texts, differing, said = CASES[name]
    path, notes = made[name]
    if reader == "js" and no_node():
        pytest.skip(no_node())
    if reader == "js":
        found = encoded(path, texts)
    else:
        tokenizer = og.Tokenizer(str(path))
        found = [[int(token) for token in tokenizer.encode(text)] for text in texts]
    library = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert (found[0] == expected[0]) is (reader not in differing.split())
    assert found[1] == expected[1]
    usual = ("portable: ", "the tokenizer composes", "generation_config")
    told = [note for note in notes if not note.startswith(usual if name != "plain nfc" else usual[::2])]
    assert len(told) == bool(said)
    assert not said or said in told[0]

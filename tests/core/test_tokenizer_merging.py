"""Tokens beside tokenizer.json are those that transformers finds there."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from smolexport.tokenizer import TokenizerSpec, TokenKind, open_tokenizer, read_tokenizer
from smolexport.tokenizer.added_tokens import rewritten
from tests.tokenizers_for_tests import BYTE_LEVEL, save, train_byte_level

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
TEXTS = ("<|endoftext|>", "<|im_end|>", "<a>", "<b>", "<c>", "the", " d", "e<", "<f>", "Ġ")
ROLES = ("bos_token", "eos_token", "pad_token", "mask_token", "image_token")


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return train_byte_level(BYTE_LEVEL["gpt2"], 300)


def flags(dice: random.Random, *names: str) -> dict[str, bool]:
    return {name: dice.random() < 0.3 for name in names if dice.random() < 0.6}


def typed(dice: random.Random) -> Any:
    """A token of tokenizer_config.json, as text or as transformers writes an object."""
    text = dice.choice(TEXTS)
    return text if dice.random() < 0.5 else {"__type": "AddedToken", "content": text, **flags(dice, *FLAGS)}


def plain(dice: random.Random) -> Any:
    """A token of special_tokens_map.json, whose objects have no type."""
    text = dice.choice(TEXTS)
    return text if dice.random() < 0.5 else {"content": text, **flags(dice, *FLAGS[:-1])}


def any_folder(seed: int, document: dict[str, Any], folder: Path) -> Path:
    """A folder in which the files name tokens as they like; only ids do not contradict each other."""
    dice = random.Random(seed)
    document, config, special, added = json.loads(json.dumps(document)), {}, {}, {}
    vocab = document["model"]["vocab"]
    for text in dice.sample(TEXTS[2:5], dice.randrange(3)):
        entry = {"id": 300 + len(document["added_tokens"]) - 3, "content": text}
        document["added_tokens"].append({**entry, **dict.fromkeys(FLAGS, False), **flags(dice, *FLAGS)})
    known = vocab | {entry["content"]: entry["id"] for entry in document["added_tokens"]}
    free = dice.sample(range(310, 340), len(TEXTS))
    ids = {text: known.get(text, index) for text, index in zip(TEXTS, free, strict=True)}
    for role in ROLES[:4]:
        config |= {role: typed(dice)} if dice.random() < 0.4 else {}
        special |= {role: plain(dice)} if dice.random() < 0.3 else {}
    config |= {ROLES[4]: dice.choice(TEXTS)} if dice.random() < 0.3 else {}
    key = dice.choice(["additional_special_tokens", "extra_special_tokens"])
    config |= {key: [typed(dice) for _ in range(dice.randrange(3))]} if dice.random() < 0.3 else {}
    key = dice.choice(["additional_special_tokens", "extra_special_tokens"])
    special |= {key: dice.sample(TEXTS, 2)} if dice.random() < 0.3 else {}
    added = {text: ids[text] for text in dice.sample(TEXTS, dice.randrange(4))}
    if dice.random() < 0.5:
        listed = dice.sample(TEXTS, dice.randrange(5))
        config["added_tokens_decoder"] = {str(ids[text]): {"content": text, **flags(dice, *FLAGS)} for text in listed}
    return save(folder, document, tokenizer_config=config, special_tokens_map=special, added_tokens=added)


def by_id(theirs: Any) -> dict[int, Any]:
    """The added tokens of a tokenizer of transformers, with all flags."""
    return {
        index: {"content": token.content, **{name: getattr(token, name) for name in FLAGS}}
        for index, token in theirs.added_tokens_decoder.items()
    }


def ours(spec: TokenizerSpec) -> dict[int, Any]:
    return {token.id: {"content": token.text, **token.flags()} for token in spec.added}


@pytest.mark.parametrize("seed", range(60))
def test_merged_as_transformers_does(seed: int, document: dict[str, Any], tmp_path: Path) -> None:
    """The same tokens, flags and ids, from the folder and from what is written of it."""
    transformers = pytest.importorskip("transformers")
    folder = any_folder(seed, document, tmp_path / "folder")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    spec = read_tokenizer(folder, 400)
    text = " ".join(TEXTS) + "x<a><b>e<f>the the" + "".join(TEXTS)
    assert ours(spec) == by_id(theirs)
    assert open_tokenizer(folder, spec).encode(text, frame=False) == theirs(text, add_special_tokens=False).input_ids
    files = rewritten(folder, spec)
    assert bool(files) == bool(spec.beside)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert by_id(transformers.PreTrainedTokenizerFast.from_pretrained(folder)) == by_id(theirs)
    again = read_tokenizer(folder, 400)
    assert (again.beside, again.added, again.tokens, again.kinds) == ((), spec.added, spec.tokens, spec.kinds)


def test_ids_follow_tokenizer_json_whatever_the_file_says(document: dict[str, Any], tmp_path: Path) -> None:
    """transformers counts on from the last id, in the order of the ids in the file."""
    spec = read_tokenizer(save(tmp_path, document, added_tokens={"<late>": 350, "<early>": 320}), 400)
    assert [(token.id, token.text) for token in spec.beside] == [(300, "<early>"), (301, "<late>")]
    assert spec.kinds[300] is TokenKind.USER
    (note,) = spec.notes
    assert note.startswith("added_tokens.json: tokens that tokenizer.json lacks")
    assert note.endswith("'<early>' (300, not 320), '<late>' (301, not 350)")
    assert json.loads(rewritten(tmp_path, spec)["added_tokens.json"]) == {"<late>": 301, "<early>": 300}


def test_a_word_of_the_vocabulary_becomes_a_special_token(document: dict[str, Any], tmp_path: Path) -> None:
    word, index = document["model"]["merges"][0][0] + document["model"]["merges"][0][1], 259
    assert document["model"]["vocab"][word] == index
    spec = read_tokenizer(save(tmp_path, document, tokenizer_config={"additional_special_tokens": [word]}), 300)
    assert spec.kinds[index] is TokenKind.CONTROL
    assert spec.notes[0].endswith(f"'{word}' ({index})")


def test_a_token_with_a_role_becomes_special(document: dict[str, Any], tmp_path: Path) -> None:
    """And the note names the file that gives it the role."""
    changed = json.loads(json.dumps(document))
    changed["added_tokens"][2]["special"] = False
    spec = read_tokenizer(save(tmp_path, changed, tokenizer_config={"eos_token": "<|im_end|>"}), 300)
    assert (spec.kinds[2], [token.text for token in spec.beside]) == (TokenKind.CONTROL, ["<|im_end|>"])
    assert spec.notes[0].startswith("tokenizer_config.json: tokens that tokenizer.json lacks, or has with other flags")


@pytest.mark.parametrize("decoder", [{}, {"added_tokens_decoder": {}}])
def test_tokens_without_a_row_are_left_out(decoder: dict[str, Any], document: dict[str, Any], tmp_path: Path) -> None:
    """Of the files that are written too: mlx-lm would look up rows that do not exist."""
    config = {"pad_token": "<p>", "extra_special_tokens": ["<e>", "<|im_end|>"], "mask_token": "<|endoftext|>"}
    if decoder:
        config = {**config, "added_tokens_decoder": {"300": {"content": "<d>"}, "301": {"content": "<e>"}}}
    save(tmp_path, document, tokenizer_config=config, added_tokens={"<a>": 300, "<b>": 301})
    spec = read_tokenizer(tmp_path, 301)
    assert (spec.pad, len(spec.tokens)) == (None, 301)
    assert set(spec.left_out) == ({"<e>", "<p>"} if decoder else {"<b>", "<p>", "<e>"})
    assert spec.tokens[300] == ("<d>" if decoder else "<a>")
    files = {name: json.loads(content) for name, content in rewritten(tmp_path, spec).items()}
    kept = {"extra_special_tokens": ["<|im_end|>"], "mask_token": "<|endoftext|>"}
    listed = {"300": ours(spec)[300]}
    assert files["tokenizer_config.json"] == (kept | {"added_tokens_decoder": listed} if decoder else kept)
    assert files["added_tokens.json"] == ({} if decoder else {"<a>": 300})


def test_files_that_transformers_does_not_read_are_named(document: dict[str, Any], tmp_path: Path) -> None:
    special = {"pad_token": "<p>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<q>"]}
    config = {"added_tokens_decoder": {}}
    save(tmp_path, document, tokenizer_config=config, special_tokens_map=special, added_tokens={"<a>": 300})
    spec = read_tokenizer(tmp_path, 400)
    assert spec.beside == ()
    assert [note.partition(": ")[0] for note in spec.notes] == ["special_tokens_map.json", "added_tokens.json"]
    assert spec.notes[0].endswith("tokenizer_config.json instead: '<p>', '<q>'")
    assert spec.notes[1].endswith("tokenizer_config.json instead: '<a>'")


def test_another_id_in_added_tokens_json_does_not_count(document: dict[str, Any], tmp_path: Path) -> None:
    spec = read_tokenizer(save(tmp_path, document, added_tokens={"<|im_end|>": 350}), 400)
    assert "<|im_end|>" in spec.tokens[:3]
    assert "added_tokens.json: token '<|im_end|>' has id 350, but 2 in tokenizer.json, which counts" in spec.notes


def test_nothing_is_written_anew_without_need(document: dict[str, Any], tmp_path: Path) -> None:
    config = {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
    spec = read_tokenizer(save(tmp_path, document, tokenizer_config=config, added_tokens={"<|im_end|>": 2}), 300)
    assert (spec.beside, spec.left_out, spec.notes, rewritten(tmp_path, spec)) == ((), (), (), {})

"""read_tokenizer on sound folders: what it finds, and from which file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolexport.errors import TokenizerError
from smolexport.tokenizer import (
    Normalizer,
    PreTokenizer,
    SpacePrefix,
    TokenizerKind,
    TokenKind,
    read_tokenizer,
    reader,
)
from smolexport.tokenizer.spec import last_ranks
from tests.tokenizers_for_tests import BYTE_LEVEL, characters_document, real_folder, save, train_byte_level

TEXTS = ["▁", "a", "b", "c", "▁a", "bc", "▁abc"]
MERGES = [["▁", "a"], ["b", "c"], ["▁a", "bc"]]


def small(**changes: Any) -> dict[str, Any]:
    return characters_document(TEXTS, MERGES) | changes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2", (PreTokenizer.DIGITS_GPT2, Normalizer.NONE, 1, 2, 2, False, {2})),
        ("smollm3", (PreTokenizer.LLAMA3, Normalizer.NONE, None, 128012, 128012, False, {128012})),
        ("qwen3", (PreTokenizer.QWEN2, Normalizer.NFC, None, 151645, 151645, False, {151645})),
        ("qwen2.5", (PreTokenizer.QWEN2, Normalizer.NFC, None, 151645, 151645, False, {151645})),
        ("stories260k", (PreTokenizer.NONE, Normalizer.NONE, 1, 2, None, True, {1, 2})),
    ],
)
def test_real_tokenizers(name: str, expected: tuple[Any, ...], tmp_path: Path) -> None:
    folder, size = real_folder(name, tmp_path)
    begin = time.process_time()
    spec = read_tokenizer(folder, size)
    taken = time.process_time() - begin
    found = (spec.pre_tokenizer, spec.normalizer, spec.bos, spec.eos, spec.eot, spec.add_bos, spec.stop_tokens)
    assert found == expected
    assert len(spec.tokens) == len(spec.kinds) == len(set(spec.tokens)) == size
    assert taken < 4, "17 MB of JSON must not take longer"


def test_kinds_and_placeholders(tmp_path: Path) -> None:
    document = small()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    document["added_tokens"].append({"id": 267, "content": "<tool>", **flags})
    document["model"]["vocab"]["[PAD268]"] = 266
    spec = read_tokenizer(save(tmp_path, document), 270)
    kinds = dict(zip(spec.tokens, spec.kinds, strict=True))
    assert kinds["<unk>"] is TokenKind.UNKNOWN
    assert kinds["</s>"] is TokenKind.CONTROL
    assert kinds["<0x0A>"] is TokenKind.BYTE
    assert kinds["▁abc"] is TokenKind.NORMAL
    assert kinds["<tool>"] is TokenKind.USER
    assert spec.tokens[266:] == ("[PAD268]", "<tool>", "[PAD268]_", "[PAD269]")
    assert spec.kinds[268:] == (TokenKind.UNUSED,) * 2


def test_scores_follow_the_merges(tmp_path: Path) -> None:
    spec = read_tokenizer(save(tmp_path, small()), 270)
    score = dict(zip(spec.tokens, spec.scores, strict=True))
    assert score["▁a"] > score["bc"] > score["▁abc"] > score["a"]
    assert spec.unbuilt == ()


SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "expected"),
    [
        (SPACE, None, (SpacePrefix.NEVER, False)),
        (
            None,
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
            (SpacePrefix.FIRST, False),
        ),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}, (SpacePrefix.MISSING, True)),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}, (SpacePrefix.NEVER, True)),
    ],
)
def test_forms_of_sentencepiece_spaces(normalizer: Any, pre_tokenizer: Any, expected: Any, tmp_path: Path) -> None:
    document = small(normalizer=normalizer, pre_tokenizer=pre_tokenizer)
    spec = read_tokenizer(save(tmp_path, document), 270)
    assert (spec.kind, (spec.space_prefix, spec.cuts_words)) == (TokenizerKind.CHARACTERS, expected)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (BYTE_LEVEL["gpt2"], PreTokenizer.GPT2),
        (BYTE_LEVEL["digits"], PreTokenizer.DIGITS_GPT2),
        (BYTE_LEVEL["llama3"], PreTokenizer.LLAMA3),
        (BYTE_LEVEL["qwen2"], PreTokenizer.QWEN2),
        (BYTE_LEVEL["qwen35"], PreTokenizer.QWEN35),
        ([{"type": "Sequence", "pretokenizers": BYTE_LEVEL["digits"]}], PreTokenizer.DIGITS_GPT2),
        (
            [BYTE_LEVEL["llama3"][0] | {"behavior": "Removed", "invert": True}, BYTE_LEVEL["llama3"][1]],
            PreTokenizer.LLAMA3,
        ),
    ],
)
def test_pre_tokenizers(steps: list[dict[str, Any]], expected: PreTokenizer, tmp_path: Path) -> None:
    document = train_byte_level(BYTE_LEVEL["gpt2"], 300)
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    assert read_tokenizer(save(tmp_path, document), 300).pre_tokenizer is expected


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Digits", "individual_digits": False}, BYTE_LEVEL["gpt2"][0]],
        [{"type": "Whitespace"}, BYTE_LEVEL["gpt2"][0]],
        [BYTE_LEVEL["llama3"][0], BYTE_LEVEL["gpt2"][0]],
        [BYTE_LEVEL["llama3"][0] | {"behavior": "Removed"}, BYTE_LEVEL["llama3"][1]],
        [BYTE_LEVEL["llama3"][0] | {"pattern": {"Regex": r"\w+|\W"}}, BYTE_LEVEL["llama3"][1]],
        [BYTE_LEVEL["gpt2"][0] | {"add_prefix_space": True}],
        [{"type": "Whitespace"}],
    ],
)
def test_unknown_pre_tokenizers_are_shown(steps: list[dict[str, Any]], tmp_path: Path) -> None:
    document = train_byte_level(BYTE_LEVEL["gpt2"], 300)
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    with pytest.raises(TokenizerError, match="unknown pre_tokenizer: ") as caught:
        read_tokenizer(save(tmp_path, document), 300)
    assert steps[0]["type"] in str(caught.value)


def test_special_tokens_by_precedence(tmp_path: Path) -> None:
    folder = save(
        tmp_path,
        small(),
        tokenizer_config={"eos_token": None, "pad_token": {"content": "</s>"}},
        special_tokens_map={"eos_token": {"content": "</s>"}},
        generation_config={"eos_token_id": [2, 5], "bos_token_id": 1},
        config={"eos_token_id": 7, "pad_token_id": -1},
    )
    spec = read_tokenizer(folder, 270)
    assert (spec.eos, spec.bos, spec.pad, spec.unk) == (2, 1, 2, 0)
    assert spec.stop_tokens == {2, 5, 7}


def test_the_turn_end_is_the_one_that_the_template_writes(tmp_path: Path) -> None:
    document = train_byte_level(BYTE_LEVEL["digits"], 300)
    save(tmp_path, document, tokenizer_config={"eos_token": "<|endoftext|>"})
    plain = read_tokenizer(tmp_path, 300)
    (tmp_path / "chat_template.jinja").write_text("{{ message }}<|im_end|>\n")
    chat = read_tokenizer(tmp_path, 300)
    assert (plain.eot, plain.stop_tokens) == (None, {0})
    assert (chat.eos, chat.eot, chat.stop_tokens) == (0, 2, {0, 2})


def test_templates_and_their_precedence(tmp_path: Path) -> None:
    save(tmp_path, small(), tokenizer_config={"chat_template": "from config"})
    assert read_tokenizer(tmp_path, 270).chat_template == "from config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert read_tokenizer(tmp_path, 270).chat_template == "from json"
    (tmp_path / "chat_template.jinja").write_text("from jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("for rag")
    spec = read_tokenizer(tmp_path, 270)
    assert (spec.chat_template, dict(spec.chat_templates)) == ("from jinja", {"rag": "for rag"})


def test_eos_is_added_when_the_post_processor_does(tmp_path: Path) -> None:
    document = small()
    post = document["post_processor"]
    post["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    post["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    spec = read_tokenizer(save(tmp_path, document), 270)
    assert (spec.add_bos, spec.bos, spec.add_eos, spec.eos, spec.stop_tokens) == (True, 1, True, 2, {2})


def test_a_repeated_merge_counts_at_its_last_place(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    texts = ["▁", "a", "b", "c", "ab", "bc"]
    document = characters_document(texts, [["a", "b"], ["b", "c"], ["a", "b"]])
    spec = read_tokenizer(save(tmp_path, document), 270)
    assert spec.merges == (("b", "c"), ("a", "b"))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("abc").tokens[-2:] == ["a", "bc"]


def test_tokens_that_only_tokenizer_config_knows_are_noted(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"2": {"content": "</s>"}, "269": {"content": "<extra>"}}}
    (note,) = read_tokenizer(save(tmp_path, small(), tokenizer_config=config), 270).notes
    assert "'<extra>'" in note


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=3, max_size=40))
def test_which_tokens_merge_agrees_with_the_library(words: list[str]) -> None:
    from tokenizers import Tokenizer, models, trainers

    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=25, show_progress=False))
    document = json.loads(trained.to_str())
    vocab = document["model"]["vocab"]
    document["model"]["vocab"] |= {"cab" * 3: len(vocab), "bbbaaa": len(vocab) + 1}
    library = Tokenizer.from_str(json.dumps(document))
    tokens = list(vocab)
    merges = [(left, right) for left, right in document["model"]["merges"]]
    ranks = last_ranks(tokens, [TokenKind.NORMAL] * len(tokens), merges)
    for index, text in enumerate(tokens):
        pieces = library.encode(text).tokens
        assert (index in ranks) == (pieces == [text]), text


def test_unbuilt_tokens_of_smollm3_need_its_whole_word_rule(tmp_path: Path) -> None:
    """SmolLM3 sets ignore_merges, and needs it: hundreds of its tokens are out of the merges' reach."""
    folder, size = real_folder("smollm3", tmp_path)
    spec = read_tokenizer(folder, size)
    assert spec.ignore_merges
    assert len(spec.unbuilt) == 588


@pytest.mark.parametrize("name", ["smollm2", "smollm3", "qwen3", "stories260k"])
def test_an_excerpt_serves_as_the_whole_file_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sound tokenizer the library reads the excerpt alone, and finds in it what it finds in the whole file."""
    folder, size = real_folder(name, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("tokenizers.Tokenizer.from_file", None)
        by_excerpt = read_tokenizer(folder, size)
    monkeypatch.setattr(reader, "_excerpt", lambda *_: None)
    assert read_tokenizer(folder, size) == by_excerpt


def test_merges_of_an_empty_token_and_merges_of_both_forms(tmp_path: Path) -> None:
    """The part stays empty, whatever holds the token's place; a list of both forms is the library's to refuse."""
    document = small()
    document["model"]["vocab"][""] = 268
    document["model"]["merges"].append(["", "a"])
    assert read_tokenizer(save(tmp_path, document), 270).merges[3] == ("", "a")
    document["model"]["merges"][0] = "▁ a"
    with pytest.raises(TokenizerError, match="is refused by tokenizers"):
        read_tokenizer(save(tmp_path, document), 270)

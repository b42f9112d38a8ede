"""llama.cpp's own tokenizer over our metadata gives the ids of the checkpoint's tokenizer.

Compared: every torture text, texts full of each tokenizer's special tokens, random mixtures of their characters,
with and without BOS.  Not compared, and pinned below as known differences: text that NFC changes (llama.cpp does
not normalise), `</s>` as ordinary text in Qwen's vocabulary, bytes that SmolLM2 has no token for, and digits of
Unicode 16.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from smolexport.tokenizer import FileTokenizer, Normalizer, TokenizerSpec, open_tokenizer, read_tokenizer
from smolexport_to_gguf.vocabulary import check_vocabulary, vocabulary_metadata, vocabulary_notes
from tests.tokenizers_for_tests import (
    BYTE_LEVEL,
    REAL,
    characters_document,
    real_folder,
    save,
    train_byte_level,
    train_characters,
)
from tests.torture import TORTURE, composed, with_special
from tests.vocab_only import LlamaVocab, opened

pytest.importorskip("llama_cpp", reason="llama.cpp is the oracle here")

CHATML = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}


@contextmanager
def both(folder: Path, size: int) -> Iterator[tuple[FileTokenizer, LlamaVocab]]:
    spec = read_tokenizer(folder, size)
    with opened(spec, folder) as llama:
        yield open_tokenizer(folder, spec), llama


@pytest.fixture(scope="module")
def real(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[FileTokenizer, LlamaVocab]]:
    """A real tokenizer, loaded once for all tests that ask for it by name."""
    with both(*real_folder(request.param, tmp_path_factory.mktemp("real"))) as pair:
        yield pair


def every_real(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("real", names or list(REAL), indirect=True)


def assert_equal(ours: FileTokenizer, llama: LlamaVocab, texts: dict[str, str]) -> None:
    tokens = ours.spec.tokens
    for name, text in texts.items():
        expected = ours.encode(text, frame=False)
        found = llama.encode(text)
        assert [tokens[i] for i in found] == [tokens[i] for i in expected], name
        assert found == expected, name
        assert llama.encode(text, add_special=True) == ours.encode(text), name


def mixtures(count: int, seed: int = 7) -> dict[str, str]:
    """Random strings of characters from the torture texts, without those that SmolLM2 has no token for."""
    characters = sorted(set("".join(TORTURE.values())) - set("\x04\x06\x13\x14\x16\x1d\x11\x1c\x10\x12\x15\x17"))
    dice = random.Random(seed)
    return {f"mixture {n}": "".join(dice.choices(characters, k=dice.randrange(1, 30))) for n in range(count)}


@every_real()
def test_real_tokenizers_equal(real: tuple[FileTokenizer, LlamaVocab]) -> None:
    ours, llama = real
    assert check_vocabulary(ours.spec) == []
    texts = TORTURE | with_special([token.text for token in ours.spec.added]) | mixtures(1500)
    if ours.spec.normalizer is Normalizer.NFC:
        texts = {key: text.replace("</s>", "</p>") for key, text in composed(texts).items()}
    assert_equal(ours, llama, texts)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_trained_byte_level_equal(name: str, ignore_merges: bool, tmp_path: Path) -> None:
    document = train_byte_level(BYTE_LEVEL[name])
    document["model"]["ignore_merges"] = ignore_merges
    save(tmp_path, document, tokenizer_config=CHATML)
    with both(tmp_path, 1000) as (ours, llama):
        assert check_vocabulary(ours.spec) == []
        assert_equal(
            ours, llama, TORTURE | with_special(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) | mixtures(500)
        )


def test_trained_characters_equal(tmp_path: Path) -> None:
    save(tmp_path, train_characters([*TORTURE.values()] * 3), tokenizer_config={"eos_token": "</s>"})
    with both(tmp_path, 1000) as (ours, llama):
        assert check_vocabulary(ours.spec) == []
        assert ours.spec.add_bos
        assert_equal(ours, llama, TORTURE | with_special(["<s>", "</s>", "<unk>"]) | mixtures(500))


@pytest.mark.parametrize("seed", range(12))
def test_characters_with_many_competing_merges(seed: int, tmp_path: Path) -> None:
    """Three letters make every token overlap with others; llama.cpp merges by score, tokenizers by the list."""
    dice = random.Random(seed)
    words = [" ".join("".join(dice.choices("abc", k=dice.randrange(1, 12))) for _ in range(6)) for _ in range(60)]
    save(tmp_path, train_characters(words, vocab_size=90), tokenizer_config={"eos_token": "</s>"})
    with both(tmp_path, 400) as (ours, llama):
        assert check_vocabulary(ours.spec) == []
        fresh = {f"text {n}": "".join(dice.choices("abc ", k=40)) for n in range(300)}
        assert_equal(ours, llama, fresh)


def llama3_with_a_token_that_no_merge_builds(ignore_merges: bool) -> dict[str, Any]:
    document = train_byte_level(BYTE_LEVEL["llama3"])
    vocab = document["model"]["vocab"]
    vocab["Ġzyzzyva"] = len(vocab)
    document["model"]["ignore_merges"] = ignore_merges
    return document


@pytest.mark.parametrize(("ignore_merges", "pre"), [(True, "llama-bpe"), (False, "smaug-bpe")])
def test_whole_words_or_merges_in_the_llama3_pattern(ignore_merges: bool, pre: str, tmp_path: Path) -> None:
    save(tmp_path, llama3_with_a_token_that_no_merge_builds(ignore_merges), tokenizer_config=CHATML)
    with both(tmp_path, 1000) as (ours, llama):
        assert {key: value for key, _, value in vocabulary_metadata(ours.spec)}["tokenizer.ggml.pre"] == pre
        taken = ours.spec.tokens.index("Ġzyzzyva") in ours.encode("a zyzzyva b")
        assert taken is ignore_merges
        assert_equal(ours, llama, TORTURE | {"rare": "a zyzzyva b zyzzyva"})


def test_whole_words_elsewhere_are_refused(tmp_path: Path) -> None:
    document = train_byte_level(BYTE_LEVEL["qwen2"])
    document["model"]["vocab"]["Ġzyzzyva"] = len(document["model"]["vocab"])
    document["model"]["ignore_merges"] = True
    spec = read_tokenizer(save(tmp_path, document, tokenizer_config=CHATML), 1000)
    assert "never builds Ġzyzzyva" in check_vocabulary(spec)[0]


@every_real("qwen3")
def test_qwen_differs_only_where_the_notes_say(real: tuple[FileTokenizer, LlamaVocab]) -> None:
    ours, llama = real
    notes = " ".join(vocabulary_notes(ours.spec))
    assert "NFC" in notes
    assert "</s> as special" in notes
    decomposed = "e\u0301"
    assert ours.encode(decomposed) == ours.encode("é") == llama.encode("é") != llama.encode(decomposed)
    assert llama.encode("<s>x</s>")[-1] == ours.spec.tokens.index("</s>") != ours.encode("<s>x</s>")[-1]


@every_real("smollm2")
def test_smollm2_lacks_some_bytes_and_the_notes_say_so(real: tuple[FileTokenizer, LlamaVocab]) -> None:
    ours, llama = real
    assert any("no token for the bytes 0x04" in note for note in vocabulary_notes(ours.spec))
    assert ours.encode("(\x04)") == ours.encode("()")
    assert llama.encode("(\x04)") == llama.encode("(") + llama.encode(")") != llama.encode("()")


@every_real("smollm2")
def test_smollm2_keeps_its_digits(real: tuple[FileTokenizer, LlamaVocab]) -> None:
    ours, llama = real
    assert ours.encode("a  4") == llama.encode("a  4") == [81, 256, 36]


@every_real()
def test_special_ids_and_pieces_arrive(real: tuple[FileTokenizer, LlamaVocab]) -> None:
    ours, llama = real
    spec = ours.spec
    size = len(spec.tokens)
    assert llama.ask("n_tokens") == size
    assert llama.ask("eos") == spec.eos
    assert llama.ask("bos") == (spec.eos if spec.bos is None else spec.bos)
    assert llama.ask("pad") == (-1 if spec.pad is None else spec.pad)
    assert llama.ask("get_add_bos") == spec.add_bos
    assert llama.ask("get_add_eos") == spec.add_eos
    for token in random.Random(3).sample(range(size), 400):
        decoder = ours.decoder(special=True)
        text = decoder.push(token) + decoder.flush()
        assert llama.piece(token).decode("utf-8", "replace") == text, spec.tokens[token]


@every_real("smollm2", "smollm3", "qwen3", "stories260k")
def test_stop_notes_are_what_llama_does(real: tuple[FileTokenizer, LlamaVocab]) -> None:
    ours, llama = real
    tokens = ours.spec.tokens
    notes = [note for note in vocabulary_notes(ours.spec) if " ends a generation at " in note]
    named = {text for note in notes for text in note.split(" at ")[1].split()}
    assert named == {tokens[token] for token in llama.ends() - ours.stop_tokens}
    unheeded = [note for note in vocabulary_notes(ours.spec) if "goes on at" in note]
    assert {note.split(" at ")[1] for note in unheeded} == {tokens[token] for token in ours.stop_tokens - llama.ends()}


def test_metadata_has_each_key_once_and_flags_always(tmp_path: Path) -> None:
    document = train_byte_level(BYTE_LEVEL["digits"])
    templates = [
        {"name": "default", "template": "{{ messages }}<|im_end|>"},
        {"name": "tool use", "template": "{# tools #}"},
    ]
    config = {"eos_token": "<|endoftext|>", "chat_template": templates}
    spec = read_tokenizer(save(tmp_path, document, tokenizer_config=config), 1000)
    entries = vocabulary_metadata(spec)
    table = {key: (kind, value) for key, kind, value in entries}
    assert len(table) == len(entries)
    assert table["tokenizer.ggml.model"] == ("string", "gpt2")
    assert table["tokenizer.ggml.pre"] == ("string", "smollm")
    assert table["tokenizer.ggml.add_bos_token"] == ("bool", False)
    assert table["tokenizer.ggml.add_eos_token"] == ("bool", False)
    assert table["tokenizer.ggml.eos_token_id"] == ("u32", 0)
    assert table["tokenizer.ggml.eot_token_id"] == ("u32", 2)
    assert table["tokenizer.chat_template"] == ("string", templates[0]["template"])
    assert table["tokenizer.chat_templates"] == ("[string]", ["tool_use"])
    assert table["tokenizer.chat_template.tool_use"] == ("string", "{# tools #}")
    kinds = dict(zip(spec.tokens, table["tokenizer.ggml.token_type"][1], strict=True))
    assert (kinds["<|im_end|>"], kinds["a"], kinds["[PAD999]"]) == (3, 1, 5)


def broken(change: str, folder: Path) -> TokenizerSpec:
    """A tokenizer that is sound for tokenizers, and that llama.cpp cannot follow."""
    document = train_characters([TORTURE["english"]], vocab_size=120)
    vocab, model = document["model"]["vocab"], document["model"]
    config: dict[str, Any] = {"eos_token": "</s>"}
    if change == "no eos":
        config = {}
    elif change == "bytes":
        del vocab["<0x41>"]
    elif change == "unbuilt":
        vocab["re it"] = len(vocab)
        vocab["zq"] = len(vocab)
    elif change == "crossing":
        document["normalizer"] = None
        document["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
        vocab["t▁"] = len(vocab)
        model["merges"].append(["t", "▁"])
    return read_tokenizer(save(folder, document, tokenizer_config=config), 1000)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("no eos", "names no eos token"),
        ("bytes", "<0x41> missing"),
        ("unbuilt", "never build re it zq"),
        ("crossing", "it would build t▁"),
    ],
)
def test_what_llama_cannot_follow_is_refused(change: str, reason: str, tmp_path: Path) -> None:
    reasons = check_vocabulary(broken(change, tmp_path))
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_a_token_that_no_merge_builds_would_really_differ(tmp_path: Path) -> None:
    """The refusal above is not caution for its own sake: llama.cpp builds `bca`, tokenizers do not."""
    texts = ["▁", "a", "b", "c", "x", "bc", "ca", "bca"]
    document = characters_document(texts, [["b", "c"], ["c", "a"], ["b", "ca"]])
    save(tmp_path, document, tokenizer_config={"eos_token": "</s>"})
    with both(tmp_path, 300) as (ours, llama):
        assert "never build bca" in check_vocabulary(ours.spec)[0]
        assert [ours.spec.tokens[i] for i in ours.encode("xbca", frame=False)][-2:] == ["bc", "a"]
        assert [ours.spec.tokens[i] for i in llama.encode("xbca")][-1] == "bca"


def test_overlapping_added_tokens_are_noted(tmp_path: Path) -> None:
    document = train_byte_level(BYTE_LEVEL["gpt2"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    size = len(document["model"]["vocab"])
    document["added_tokens"] += [
        {"id": size, "content": "<x>=", **flags},
        {"id": size + 1, "content": "=<yyy>", **flags},
    ]
    save(tmp_path, document, tokenizer_config=CHATML)
    with both(tmp_path, 1000) as (ours, llama):
        assert "in '<x>=<yyy>' llama.cpp finds '=<yyy>', the tokenizer '<x>='" in vocabulary_notes(ours.spec)
        assert ours.encode("<x>=<yyy>") != llama.encode("<x>=<yyy>")

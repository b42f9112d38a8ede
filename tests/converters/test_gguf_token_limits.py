"""Tokens that llama.cpp cannot hold, or takes otherwise than the checkpoint: converted, and the notes say what happens.

Each is tried on llama.cpp itself and on the tokenizer, whose ids are transformers' (test_tokenizer_merging.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from smolexport import plugins
from smolexport.conversion.pipeline import export
from smolexport.errors import UnsupportedError
from smolexport.tokenizer import FileTokenizer, TokenizerSpec, open_tokenizer, read_tokenizer
from smolexport_to_gguf.vocabulary import check_vocabulary, vocabulary_metadata, vocabulary_notes
from tests.cases_for_tests import made_case
from tests.tokenizers_for_tests import BYTE_LEVEL, save, train_byte_level
from tests.vocab_only import LlamaVocab, opened

pytest.importorskip("llama_cpp", reason="llama.cpp is the oracle here")

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
SIZE = 330  # of the model
FIRST = 300  # id of the first new token


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return train_byte_level(BYTE_LEVEL["gpt2"], FIRST)


@contextmanager
def both(
    folder: Path,
    document: dict[str, Any],
    added: list[tuple[str, dict[str, bool]]] = (),  # type: ignore[assignment]
    listed: tuple[str, ...] = (),
    nfc: bool = False,
) -> Iterator[tuple[FileTokenizer, LlamaVocab, list[str]]]:
    """The tokenizer with more tokens, `listed` in model.vocab; llama.cpp's; and the notes but those of stops."""
    document = json.loads(json.dumps(document))
    for text in listed:
        document["model"]["vocab"][text] = len(document["model"]["vocab"])
    start = len(document["model"]["vocab"])
    for index, (text, flags) in enumerate(added, start):
        document["added_tokens"].append({"id": index, "content": text, **FLAGS, **flags})
    document["normalizer"] = {"type": "NFC"} if nfc else None
    spec = read_tokenizer(save(folder, document, tokenizer_config={"eos_token": "<|im_end|>"}), SIZE)
    assert check_vocabulary(spec) == []
    notes = [note for note in vocabulary_notes(spec) if "ends a generation" not in note and "composes" not in note]
    with opened(spec, folder) as llama:
        yield open_tokenizer(folder, spec), llama, notes


def ids(ours: FileTokenizer, llama: LlamaVocab, text: str) -> tuple[list[int], list[int]]:
    return ours.encode(text, frame=False), llama.encode(text)


@pytest.mark.parametrize(
    "texts",
    [("\0",), ("q\0w",), ("<x>\0a", "<x>\0b"), ("<|im_end|>\0",), ("a\0", "[NUL300]")],
    ids=["alone", "behind", "twice", "of another", "with its place holder"],
)
def test_a_token_with_nul_is_never_found(texts: tuple[str, ...], plain: dict[str, Any], tmp_path: Path) -> None:
    """Written as it is, llama.cpp would find the part before NUL anywhere, or end the process over two equal texts."""
    with both(tmp_path, plain, [(text, {}) for text in texts]) as (ours, llama, notes):
        for index, text in enumerate(texts, FIRST):
            if "\0" not in text:
                continue
            assert ours.encode(text, frame=False) == [index]
            found = llama.encode(text)
            assert index not in found
            assert b"".join(llama.piece(token) for token in found) == text.encode()
            assert llama.piece(index) == b""
            before = text.partition("\0")[0] + "q"
            assert llama.encode(before) == ours.encode(before, frame=False)
        (note,) = notes
        assert note.startswith("llama.cpp reads a token's text up to NUL: it never finds ")
        assert repr(texts[0])[1:-1] in note


def test_nul_in_words_and_merges(plain: dict[str, Any], tmp_path: Path) -> None:
    """model.vocab may hold texts that byte-level text never has."""
    document = json.loads(json.dumps(plain))
    for text in ("a\0", "a \0", "b c", "a b c"):
        document["model"]["vocab"][text] = len(document["model"]["vocab"])
    document["model"]["vocab"] |= {"\0": 304, " ": 305, "a ": 306}
    document["model"]["merges"] += [["a", "\0"], ["a", " "], ["a ", "\0"], ["a ", "b c"]]
    with both(tmp_path, document) as (ours, llama, notes):
        merges = {key: value for key, _, value in vocabulary_metadata(ours.spec)}["tokenizer.ggml.merges"]
        assert len(merges) == len(document["model"]["merges"]) - 4  # type: ignore[arg-type]
        for text in ("a\0", "a \0", "a b c", "b c"):
            assert ids(ours, llama, text) == (llama.encode(text),) * 2
        assert any("prints [UNK_BYTE_…] for " in note for note in notes)


STRIPS: list[tuple[str, str, list[str]]] = [
    ("lstrip", "the space before <m> stays a token of its own: llama.cpp does not support lstrip", ["a <m>", "<m> b"]),
    ("rstrip", "the space after <m> stays in the text: llama.cpp does not support rstrip", ["<m> b", "a <m>"]),
    ("single_word", "llama.cpp finds <m> within words too: it does not support single_word", ["a<m>b", "a <m> b"]),
]


@pytest.mark.parametrize(("flag", "said", "texts"), STRIPS)
def test_spaces_stay_and_words_are_cut(
    flag: str, said: str, texts: list[str], plain: dict[str, Any], tmp_path: Path
) -> None:
    """The first text differs as the note says, the second does not; without the flag both would be equal."""
    with both(tmp_path, plain, [("<m>", {flag: True})]) as (ours, llama, notes):
        assert notes == [said]
        expected, found = ids(ours, llama, texts[0])
        assert expected != found
        assert b"".join(map(llama.piece, found)).decode() == texts[0]
        assert ids(ours, llama, texts[1]) == (llama.encode(texts[1]),) * 2
    with both(tmp_path, plain, [("<m>", {})]) as (ours, llama, notes):
        assert notes == []
        for text in texts:
            assert ids(ours, llama, text) == (found if text == texts[0] else llama.encode(text),) * 2


def test_tokens_that_are_normalized_under_nfc(plain: dict[str, Any], tmp_path: Path) -> None:
    composed, apart = "<\u00e9\u00e1>", "<e\u0301a\u0301>"
    with both(tmp_path, plain, [(apart, {"normalized": True})], nfc=True) as (ours, llama, notes):
        assert notes == [f"{apart}: the tokenizer finds the composed form too, llama.cpp only this one"]
        assert ids(ours, llama, apart) == ([FIRST], [FIRST])
        assert (ours.encode(composed, frame=False), FIRST in llama.encode(composed)) == ([FIRST], False)
    with both(tmp_path, plain, [(apart, {})], nfc=True) as (ours, llama, notes):
        assert notes == []
        assert ids(ours, llama, apart) == ([FIRST], [FIRST])
        assert FIRST not in ours.encode(composed, frame=False)
    with both(tmp_path, plain, [(composed, {"normalized": True})], nfc=True) as (ours, llama, notes):
        assert notes == []
        assert ids(ours, llama, composed) == ([FIRST], [FIRST])


@pytest.mark.parametrize(
    ("added", "text"),
    [
        ([("<e>", {}), ("<e>x", {"normalized": True})], "<e>x"),
        ([("b>", {}), ("<ab>", {"normalized": True})], "<ab>"),
        ([("b>x", {}), ("<aab", {"normalized": True})], "<aab>x"),
        ([("<e>", {}), ("<e>x", {})], None),
    ],
)
def test_tokens_that_are_not_normalized_come_first(
    added: list[tuple[str, dict[str, bool]]], text: str | None, plain: dict[str, Any], tmp_path: Path
) -> None:
    with both(tmp_path, plain, added) as (ours, llama, notes):
        for one in [text] if text else ["<e>x", "<e> x"]:
            expected, found = (
                " ".join(repr(ours.spec.tokens[token]) for token in side if token >= FIRST)
                for side in ids(ours, llama, one)
            )
            assert (expected != found) is (text is not None)
            assert notes == ([f"in '{one}' llama.cpp finds {found}, the tokenizer {expected}"] if text else [])


def test_ordinary_tokens_with_special_texts(plain: dict[str, Any], tmp_path: Path) -> None:
    texts = ("</s>", "<PRE>", "<|channel|>", "[e~[", "▁<SUF>")
    with both(tmp_path, plain, listed=texts) as (ours, llama, notes):
        assert f"llama.cpp treats {' '.join(texts)} as special wherever text has it; here it is ordinary " in (
            " ".join(notes)
        )
        for index, text in enumerate(texts, FIRST):
            assert index not in ours.encode(text, frame=False)
            assert llama.encode(text) == [index]


def test_of_a_group_of_texts_one_is_taken(plain: dict[str, Any], tmp_path: Path) -> None:
    texts = ("<PRE>", "<fim_prefix>", "[PAD]", "<PAD>")
    with both(tmp_path, plain, listed=texts) as (ours, llama, notes):
        assert notes == [
            f"llama.cpp treats one of {group} as a control token, whatever it is here"
            for group in ("<PAD> [PAD]", "<PRE> <fim_prefix>")
        ]
        found = [llama.encode(text) == [index] for index, text in enumerate(texts, FIRST)]
        assert (sum(found[:2]), sum(found[2:])) == (1, 1)
        assert len(llama.ends() & {FIRST + 2, FIRST + 3}) == 1
        said = [note for note in vocabulary_notes(ours.spec) if "ends a generation at one of" in note]
        assert said == ["llama.cpp ends a generation at one of <PAD> [PAD]"]


def test_what_is_printed_and_what_is_not(plain: dict[str, Any], tmp_path: Path) -> None:
    added = [("<|x|>", {}), ("<PRE>", {}), ("[e~[", {}), ("<y>", {}), ("<|start|>", {"special": True})]
    with both(tmp_path, plain, added) as (ours, llama, notes):
        assert notes == [
            "llama.cpp treats <|x|> <PRE> [e~[ as control tokens, which it does not print",
            "llama.cpp prints <|start|>",
        ]
        shown = [llama.piece(token, special=False) for token in range(FIRST, FIRST + len(added))]
        assert shown == [b"", b"", b"", b"<y>", b"<|start|>"]
        for text, _ in added:
            expected, found = ids(ours, llama, f"a {text}b")
            assert expected == found


@pytest.mark.parametrize(
    "texts",
    [("<|end|>", "<|call|>", "<|return|>"), ("<|end|>", "<|calls|>", "<|flush|>"), ("<|end|>", "<|call|>"),
     ("</s>", "<|tool_response>"), ("</s>", "<turn|>")],
)  # fmt: skip
def test_ends_that_are_none_beside_others(texts: tuple[str, ...], plain: dict[str, Any], tmp_path: Path) -> None:
    with both(tmp_path, plain, [(text, {"special": True}) for text in texts]) as (ours, llama, notes):
        (said,) = [note for note in vocabulary_notes(ours.spec) if "also ends a generation" in note]
        tokens = ours.spec.tokens
        assert set(said.split(" at ")[1].split()) == {tokens[token] for token in llama.ends() - ours.stop_tokens}
        shown = [text for index, text in enumerate(texts, FIRST) if llama.piece(index, special=False)]
        lost = [text for index, text in enumerate(texts, FIRST) if llama.encode(text) != [index]]
        printed = [text for text in shown if text not in lost]
        assert notes == [
            *(f"llama.cpp treats {text} as ordinary text beside <|tool_response>" for text in lost),
            *(f"llama.cpp prints {text}" for text in printed),
        ]


def exported(folder: Path, source: Path, **options: Any) -> tuple[Path, list[str]]:
    job = export("gguf", source, folder / "x.gguf", quant="q8_0", force=True, **options)
    return job.path, [note for note in job.plan.notes if "also ends" not in note]


@pytest.mark.parametrize(
    ("number", "text", "expected", "found", "said"),
    [
        ("34", "A\0B<x>", [35, 4096, 36, 4097], [35, 191, 36, 4097], "it never finds \\x00"),
        ("36", "a <mask> b", [67, 4096, 271], [67, 223, 4096, 271], "the space before <mask> stays"),
    ],
)
def test_recipes(number: str, text: str, expected: list[int], found: list[int], said: str, tmp_path: Path) -> None:
    if plugins.missing("torch"):
        pytest.skip("transformers is not installed")
    folder = made_case(number, tmp_path / "model")
    path, notes = exported(tmp_path, folder)
    assert plugins.runtime("torch").open_chat(folder).encode(text) == expected
    assert plugins.runtime("llamacpp").open_chat(path).encode(text) == found
    assert len(notes) == 1
    assert said in notes[0]


def test_names_by_which_llama_drops_spaces(demo: Path, tmp_path: Path) -> None:
    """It looks for "phi3" in the model's name, and then for four tokens without which it loads nothing."""
    import shutil

    with pytest.raises(UnsupportedError, match=r"called 'My-Phi3-tune' without the token </s> <s> <unk>"):
        exported(tmp_path, demo, name="My-Phi3-tune")
    folder = shutil.copytree(demo, tmp_path / "model")
    document = json.loads((folder / "tokenizer.json").read_text())
    names = {"</s>": "<!-- ", "<s>": "<!-- a", "<unk>": "<!-- ab"}
    vocab = document["model"]["vocab"]
    for new, old in zip(names, list(vocab)[-3:], strict=True):
        left, right = next(pair for pair in document["model"]["merges"] if "".join(pair) == old)
        document["model"]["merges"].remove([left, right])
        vocab[new] = vocab.pop(old)
        document["added_tokens"].append({"id": vocab[new], "content": new, **FLAGS, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(document))
    path, notes = exported(tmp_path, folder, name="My-Phi3-tune")
    encode = plugins.runtime("llamacpp").open_chat(path).encode
    assert encode("<|im_end|> b") == encode("<|im_end|>b")
    assert encode("<s> b") != encode("<s>b")
    assert any(
        "by the name of the model llama.cpp drops the space beside <|im_start|> <|im_end|> </s>" in n for n in notes
    )
    path, notes = exported(tmp_path, folder, name="tune")
    encode = plugins.runtime("llamacpp").open_chat(path).encode
    assert encode("<|im_end|> b") != encode("<|im_end|>b")
    assert not any("by the name" in note for note in notes)


def test_the_longest_overlaps_are_found_in_time(tmp_path: Path, plain: dict[str, Any]) -> None:
    import time

    document = json.loads(json.dumps(plain))
    document["added_tokens"] += [{"id": FIRST + index, "content": "∎" * (index + 2), **FLAGS} for index in range(3000)]
    spec: TokenizerSpec = read_tokenizer(
        save(tmp_path, document, tokenizer_config={"eos_token": "<|im_end|>"}), FIRST + 3000
    )
    begin = time.process_time()
    vocabulary_notes(spec)
    assert time.process_time() - begin < 4

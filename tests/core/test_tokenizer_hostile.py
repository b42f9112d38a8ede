"""Tokenizer files from strangers: one clear line for each fault, never a traceback of another kind."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolexport.errors import CheckpointError, SmolexportError, TokenizerError
from smolexport.tokenizer import TokenizerSpec, files, read_tokenizer
from tests.tokenizers_for_tests import characters_document, save

Document = dict[str, Any]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def small() -> Document:
    return characters_document(["▁", "a", "b", "▁a", "▁ab"], [["▁", "a"], ["▁a", "b"]])


def at(*path: Any, value: Any) -> Callable[[Document], None]:
    """A change of one place in the document."""

    def change(document: Document) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def added(index: Any, text: Any, **flags: Any) -> Callable[[Document], None]:
    return lambda document: document["added_tokens"].append({"id": index, "content": text, **FLAGS, **flags})


FAULTS: dict[str, tuple[Callable[[Document], None], str]] = {
    "no model": (at("model", value=None), "model is None, not an object"),
    "unigram": (at("model", "type", value="Unigram"), "model.type is 'Unigram'; only BPE"),
    "wordpiece": (at("model", "type", value="WordPiece"), "model.type is 'WordPiece'"),
    "dropout": (at("model", "dropout", value=0.1), "model.dropout is 0.1"),
    "suffix": (at("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix is '</w>'"),
    "vocab list": (at("model", "vocab", value=[["a", 0]]), "model.vocab is .* not an object"),
    "vocab empty": (at("model", "vocab", value={}), "model.vocab is empty"),
    "id text": (at("model", "vocab", "a", value="7"), "id of token 'a' is '7'"),
    "id bool": (at("model", "vocab", "a", value=True), "id of token 'a' is True"),
    "id negative": (at("model", "vocab", "a", value=-1), "id of token 'a' is -1"),
    "id huge": (at("model", "vocab", "a", value=10**30), "only 300 rows"),
    "id too large": (at("model", "vocab", "a", value=300), "token 'a' has id 300, but the model has only 300 rows"),
    "id twice": (at("model", "vocab", "a", value=261), "share id 261"),
    "merges missing": (at("model", "merges", value=None), "model.merges is None, not a list"),
    "merge of three": (at("model", "merges", 0, value=["a", "b", "a"]), "merge 0 .* a merge is a pair"),
    "merge of one": (at("model", "merges", 0, value="a"), "merge 0 'a'; a merge is a pair|merge 0 is 'a'"),
    "merge of numbers": (at("model", "merges", 0, value=[1, 2]), "merge 0 is"),
    "merge of lists": (at("model", "merges", 0, value=[["a"], "b"]), "merge 0 is"),
    "merge part unknown": (at("model", "merges", 0, value=["a", "zz"]), "needs the token 'zz'"),
    "merge result unknown": (at("model", "merges", 0, value=["b", "a"]), "needs the token 'ba'"),
    "unk unknown": (at("model", "unk_token", value="<none>"), "unk_token '<none>' is not in model.vocab"),
    "unk number": (at("model", "unk_token", value=3), "unk_token is 3, not a string"),
    "ignore_merges": (at("model", "ignore_merges", value="yes"), "ignore_merges is 'yes'"),
    "added list": (at("added_tokens", value={"a": 1}), "added_tokens is .* not a list"),
    "added content": (added(264, 5), "content of an added token is 5"),
    "added flag": (added(264, "<x>", lstrip="no"), "lstrip of added token '<x>' is 'no'"),
    "added id": (added(None, "<x>"), "id of token '<x>' is None"),
    "added too large": (added(4096, "<x>"), "token '<x>' has id 4096"),
    "added taken": (added(260, "<x>"), "share id 260"),
    "added twice": (added(264, "</s>"), "the added token '</s>' appears with two ids"),
    "added with a gap": (added(290, "<x>"), "gives the added token '<x>' another id than the file's 290"),
    "normalizer": (at("normalizer", value={"type": "Lowercase"}), "unknown normalizer: .*Lowercase"),
    "normalizer number": (at("normalizer", value=3), "normalizer is 3"),
    "steps": (at("normalizer", "normalizers", value=None), "normalizer.normalizers is None"),
    "pre_tokenizer": (at("pre_tokenizer", value={"type": "BertPreTokenizer"}), "unknown pre_tokenizer: .*Bert"),
    "post_processor": (at("post_processor", value={"type": "Nonsense"}), "is refused by tokenizers"),
    "two before": (
        lambda d: d["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<s>", "type_id": 0}}),
        r"puts the ids \[1, 1\] before the text",
    ),
    "added by post_processor": (
        at("post_processor", "special_tokens", "<s>", "ids", value=[70_000]),
        "post_processor adds the id 70000",
    ),
    "surrogate": (added(264, "<\ud800>"), "half a surrogate pair"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_tokenizer_json(name: str, tmp_path: Path) -> None:
    change, message = FAULTS[name]
    document = small()
    change(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match=message) as caught:
        read_tokenizer(tmp_path, 300)
    line = str(caught.value)
    assert line.startswith(str(tmp_path / "tokenizer.json"))
    assert "\n" not in line
    assert len(line) < len(str(tmp_path)) + 1500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "the top level is"),
        (b"null", "the top level is None"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b'{"model": {"vocab": {"a": 0, "a": 1}}}', "key 'a' appears twice"),
        (b'{"model": ' + b"[" * 200_000, "nested too deeply|not valid JSON"),
        (b'{"model": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_what_is_no_tokenizer_at_all(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(tmp_path, 300)


def test_a_missing_file_and_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="does not exist; save"):
        read_tokenizer(tmp_path, 300)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a regular file"):
        read_tokenizer(tmp_path, 300)


def test_a_file_of_absurd_size_is_not_even_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    with pytest.raises(TokenizerError, match="more than any tokenizer needs"):
        read_tokenizer(tmp_path, 300)


@pytest.mark.parametrize(
    ("companions", "message"),
    [
        ({"tokenizer_config": {"eos_token": 2}}, "eos_token is 2, not a string"),
        ({"tokenizer_config": {"bos_token": {"text": "<s>"}}}, "bos_token is None, not a string"),
        ({"tokenizer_config": {"bos_token": "</s>"}}, r"puts the ids \[1\] before the text, and bos_token_id is 2"),
        ({"tokenizer_config": {"chat_template": 5}}, "chat_template is 5, not a list"),
        ({"tokenizer_config": {"chat_template": [{"name": "default"}]}}, "chat template 'default' is None"),
        ({"tokenizer_config": {"chat_template": "\ud800"}}, "half a surrogate pair"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"5": {"content": "</s>"}}}},
            "has id 5, but 2 in tokenizer.json",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder is"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<y>"}}}}, "has the id 'x'; ids are whole"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": "<y>"}}}, "added token '9' is '<y>', not an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": {"content": "\ud800"}}}}, "half a surrogate pair"),
        ({"tokenizer_config": {"mask_token": {"content": "<m>", "lstrip": 1}}}, "lstrip of mask_token is 1"),
        ({"tokenizer_config": {"additional_special_tokens": [3]}}, "an entry of extra_special_tokens is 3"),
        ({"special_tokens_map": {"additional_special_tokens": "<y>"}}, "extra_special_tokens is '<y>', not a list"),
        ({"added_tokens": {"<y>": "9"}}, "the id of token '<y>' is '9'"),
        ({"added_tokens": {"<y>": -1}}, "the id of token '<y>' is -1"),
        ({"added_tokens": ["<y>"]}, "the top level is"),
        ({"tokenizer_config": []}, "the top level is"),
        ({"special_tokens_map": {"eos_token": ["</s>"]}}, "eos_token is"),
        ({"generation_config": {"eos_token_id": [2, "3"]}}, "eos_token_id is"),
        ({"config": {"eos_token_id": 300}}, "eos_token_id 300 is outside the vocabulary of 300"),
        ({"config": {"pad_token_id": 1.5}}, "pad_token_id is 1.5"),
    ],
)
def test_faults_in_the_files_beside_it(companions: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        read_tokenizer(save(tmp_path, small(), **companions), 300)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("role", ["pad", "eos"])
def test_a_special_token_without_a_row_is_only_noted(role: str, tmp_path: Path) -> None:
    folder = save(tmp_path, small(), tokenizer_config={f"{role}_token": "[NEW]"})
    spec = read_tokenizer(folder, 264)
    assert getattr(spec, role) is None
    assert spec.left_out == ("[NEW]",)
    (note,) = spec.notes
    assert "tokenizer_config.json: " in note
    assert "no row" in note
    assert "'[NEW]'" in note
    assert getattr(read_tokenizer(folder, 265), role) == 264


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in _places(part, (*path, key)))]


SOUND = small()
# The 256 byte tokens are all alike: a few of their places are enough.
PLACES = [place for place in _places(SOUND) if place and not (len(place) == 3 and str(place[-1]).startswith("<0x"))]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 400) | st.just(2**70) | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(PLACES), JUNK | st.just("absent")), min_size=1, max_size=3))
def test_junk_anywhere_is_refused_or_read(tmp_path: Path, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    document = copy.deepcopy(SOUND)
    for path, value in changes:
        try:
            place: Any = document
            for key in path[:-1]:
                place = place[key]
            if value == "absent":
                del place[path[-1]]
            else:
                place[path[-1]] = value
        except (KeyError, IndexError, TypeError):  # an earlier change removed the place
            continue
    save(tmp_path, document)
    found: TokenizerSpec | str
    try:
        found = read_tokenizer(tmp_path, 300)
    except SmolexportError as error:
        found = str(error)
    if isinstance(found, str):
        assert "\n" not in found
    else:
        assert len(found.tokens) == len(set(found.tokens)) == 300


ROLES = ("eos_token", "mask_token", "image_token", "extra_special_tokens", "additional_special_tokens")
BESIDE = st.dictionaries(st.sampled_from((*ROLES, "added_tokens_decoder")), JUNK, max_size=3)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BESIDE, BESIDE, JUNK)
def test_junk_beside_it_is_refused_or_read(tmp_path: Path, config: Any, special: Any, added: Any) -> None:
    save(tmp_path, SOUND, tokenizer_config=config, special_tokens_map=special, added_tokens=added)
    found: TokenizerSpec | str
    try:
        found = read_tokenizer(tmp_path, 300)
    except SmolexportError as error:
        found = str(error)
    if isinstance(found, str):
        assert "\n" not in found
    else:
        assert len(found.tokens) == len(set(found.tokens)) == 300


class Interrupted(BaseException):
    """What a signal handler may raise."""


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("method", ["load", "token_to_id"])
def test_an_interruption_is_no_fault_of_the_file(
    error: type[BaseException], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(small()))
    interrupt(method, error, monkeypatch)
    with pytest.raises(error):
        read_tokenizer(tmp_path, 300)


@pytest.mark.parametrize("method", ["load", "token_to_id"])
def test_a_panic_is_a_fault_of_the_file(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(small()))
    interrupt(method, type("PanicException", (BaseException,), {}), monkeypatch)
    with pytest.raises(TokenizerError, match="download the file again"):
        read_tokenizer(tmp_path, 300)


def interrupt(method: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `error` raised while the library is in `method`, as by a signal's handler."""
    import tokenizers

    class Library:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            if name == method:
                raise error
            return getattr(self._inner, name)

        @classmethod
        def from_file(cls, path: str) -> Library:
            if method == "load":
                raise error
            return cls(real.from_file(path))

        @classmethod
        def from_str(cls, text: str) -> Library:
            if method == "load":
                raise error
            return cls(real.from_str(text))

    real = tokenizers.Tokenizer
    monkeypatch.setattr(tokenizers, "Tokenizer", Library)

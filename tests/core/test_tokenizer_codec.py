"""FileTokenizer: ids straight from tokenizer.json, text streamed without broken characters."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from smolexport.errors import TokenizerError, UsageError
from smolexport.run.session import TextCodec
from smolexport.tokenizer import FileTokenizer, open_tokenizer, read_tokenizer
from tests.tokenizers_for_tests import BYTE_LEVEL, REAL, real_folder, save, train_byte_level, train_characters
from tests.torture import TORTURE, composed


def opened(folder: Path, size: int) -> FileTokenizer:
    return open_tokenizer(folder, read_tokenizer(folder, size))


def library(folder: Path):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_smollm2_keeps_its_digits(tmp_path: Path) -> None:
    """AutoTokenizer of transformers 5.23 loses the Digits step and gives other ids here."""
    assert opened(*real_folder("smollm2", tmp_path)).encode("a  4") == [81, 256, 36]


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_stream_what_the_library_decodes(name: str, tmp_path: Path) -> None:
    folder, size = real_folder(name, tmp_path)
    codec: TextCodec = opened(folder, size)
    assert isinstance(codec, FileTokenizer)
    whole = library(folder)
    for text in composed(TORTURE).values():
        ids = codec.encode(text)
        assert ids == whole.encode(text).ids
        assert codec.decode(ids) == whole.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_streaming_never_shows_half_a_character(kind: str, tmp_path: Path) -> None:
    texts = [text for name, text in TORTURE.items() if name != "looks_special"]  # its "▁" would come back as a space
    document = train_byte_level(BYTE_LEVEL["digits"], 300) if kind == "bytes" else train_characters(texts, 120)
    codec = opened(save(tmp_path, document), 400)
    for text in texts:
        decoder = codec.decoder(opens=True, special=True)
        parts = [decoder.push(token) for token in codec.encode(text, frame=False)]
        shown = "".join(parts)
        assert shown == text
        assert decoder.flush() == ""
        assert len(parts) > 20 or len(text) < 40


def test_bytes_that_are_not_utf8_equal_the_library(tmp_path: Path) -> None:
    folder = save(tmp_path, train_byte_level(BYTE_LEVEL["gpt2"], 400))
    codec, whole = opened(folder, 450), library(folder)
    dice = random.Random(11)
    for _ in range(500):
        ids = dice.choices(range(400), k=dice.randrange(1, 12))
        assert codec.decode(ids) == whole.decode(ids, skip_special_tokens=True)
        assert codec.decode(ids, special=True) == whole.decode(ids, skip_special_tokens=False)


def test_flush_gives_up_what_is_incomplete(tmp_path: Path) -> None:
    codec = opened(save(tmp_path, train_byte_level(BYTE_LEVEL["gpt2"], 260)), 300)
    decoder = codec.decoder()
    first = codec.encode("é")[0]
    assert (decoder.push(first), decoder.flush(), decoder.flush()) == ("", "\ufffd", "")


def test_a_continuation_keeps_its_space_and_an_opening_does_not(tmp_path: Path) -> None:
    codec = opened(save(tmp_path, train_characters([*TORTURE.values()])), 1000)
    ids = codec.encode("once more", frame=False)
    going_on, opening = codec.decoder(), codec.decoder(opens=True)
    assert "".join(map(going_on.push, ids)) == " once more"
    assert "".join(map(opening.push, ids)) == codec.decode(ids) == "once more"


def test_bos_is_framed_and_special_tokens_in_the_text_are_found(tmp_path: Path) -> None:
    codec = opened(save(tmp_path, train_characters([*TORTURE.values()])), 1000)
    assert codec.encode("")[:1] == [1]
    assert codec.encode("", frame=False) == []
    assert codec.encode("</s>", frame=False) == [2]
    assert codec.decode([1, *codec.encode("hi", frame=False), 2]) == "hi"


def test_truncation_and_padding_in_the_file_do_nothing(tmp_path: Path) -> None:
    document = train_byte_level(BYTE_LEVEL["gpt2"], 300)
    plain = opened(save(tmp_path / "plain", document), 300).encode("a long enough text")
    document["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    assert opened(save(tmp_path / "cut", document), 300).encode("a long enough text") == plain
    assert json.loads((tmp_path / "cut" / "tokenizer.json").read_text())["truncation"]["max_length"] == 3


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    codec = opened(save(tmp_path, train_byte_level(BYTE_LEVEL["gpt2"], 260)), 300)
    with pytest.raises(UsageError, match="half a surrogate"):
        codec.encode("a\ud800")
    for token in (300, -1):
        with pytest.raises(TokenizerError, match="outside the vocabulary of 300"):
            codec.decoder().push(token)

"""README.md of an MLX folder: readable by the hub's own library, whatever stands in the source's."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smolexport.conversion.model_card import front_matter
from smolexport.errors import CheckpointError
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from smolexport_to_mlx.folder import card
from tests.children import python
from tests.converters.mlx_models import open_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny checkpoint with tokenizer files."""
    return write_tokenizer(write_checkpoint(tmp_path / "source", "llama", num_hidden_layers=1))


README = """---
license: apache-2.0
license_name: "other: one"
language:
- en
- no
- "zh"
tags:
- text
base_model: someone/else
model-index: [{name: x}]
---

# The source
license: not this one
"""


def read_matter(raw: bytes) -> dict[str, Any]:
    """The front matter as the hub's own library reads it."""
    from huggingface_hub import ModelCard

    return dict(ModelCard(raw.decode()).data.to_dict())


def test_the_card(source: Path) -> None:
    (source / "README.md").write_text(README)
    model = replace(open_model(source), name="Tiny-Model", origin="someone/Tiny-Model")
    raw = card(model, "int4", 5.0321, ["embedding: 6 bits", "line\nwith a break"])
    assert raw == card(model, "int4", 5.0321, ["embedding: 6 bits", "line\nwith a break"])
    assert read_matter(raw) == {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx"],
        "base_model": "someone/Tiny-Model",
        "license": "apache-2.0",
        "license_name": "other: one",
        "language": ["en", "no", "zh"],
    }
    body = raw.decode().split("---\n", 2)[2]
    for words in (
        "[someone/Tiny-Model](https://huggingface.co/someone/Tiny-Model), converted to MLX by smolexport",
        "`int4` (5.03 bits per weight)",
        "- embedding: 6 bits\n- line with a break\n",
        "mlx_lm.generate",
        "loadModelContainer(from: folder",
    ):
        assert words in body


def test_the_card_of_a_local_model(source: Path) -> None:
    model = replace(open_model(source), name="x`<script>\n# y")
    raw = card(model, "bf16", 16, [])
    assert "base_model" not in read_matter(raw)
    assert "license" not in read_matter(raw)
    assert "# x script # y, bf16 for MLX\n" in raw.decode()
    assert "<" not in raw.decode().replace("PATH_TO_THIS_FOLDER", "")


NESTED = "license: mit\nx: " + "[" * 20_000
LAUGHS = "license: mit\na: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
    for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
MERGES = "license: mit\na: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]}}\n"
    for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
MATTERS: dict[str, tuple[bytes, dict[str, Any] | None]] = {
    "none": (b"# A model\n\nlicense: mit\n", {}),
    "empty": (b"", {}),
    "empty matter": (b"---\n---\n", {}),
    "carriage returns": (b"\xef\xbb\xbf---\r\nlicense: mit\r\nlanguage: [en, fr]\r\n---\r\nx", {
        "license": "mit", "language": ["en", "fr"]}),
    "no end": (b"---\nlicense: mit\n", None),
    "not YAML": (b"---\nlicense: [mit\n---\n", None),
    "tabs": (b"---\n\tlicense: mit\n---\n", None),
    "a list": (b"---\n- license\n- mit\n---\n", {}),
    "a text": (b"---\nlicense\n---\n", {}),
    "other types": (b"---\nlicense: {a: b}\nlanguage: [[en], {a: b}, en]\n---\n", {"language": ["en"]}),
    "Norwegian": (b"---\nlanguage: no\n---\n", {"language": "no"}),
    "code": (b"---\nlicense: !!python/object/apply:os.system [touch hacked]\nlanguage: en\n---\n", {
        "license": ["touch hacked"], "language": "en"}),
    "control characters": (b"---\nlicense: \"a\\e[2Jb\"\nlanguage: \"\\n\"\n---\n", {}),
    "a number of 10,000 digits": (b"---\nlicense: mit\nx: " + b"9" * 10_000 + b"\n---\n", {"license": "mit"}),
    "long text": (b"---\nlicense: " + b"x" * 1000 + b"\n---\n", {}),
    "too long": (b"---\nlicense: mit\nx: |\n" + b"  y\n" * 20_000 + b"---\n", None),
    "deep": (f"---\n{NESTED}\n---\n".encode(), None),
    "laughs": (f"---\n{LAUGHS}---\n".encode(), {"license": "mit"}),
    "merges": (f"---\n{MERGES}---\n".encode(), {"license": "mit"}),
    "binary": (bytes(range(256)) * 8, {}),
    "latin": (b"---\nlicense: mit\nx: \xe9\n---\n", {"license": "mit"}),
}  # fmt: skip


@pytest.mark.parametrize("case", MATTERS)
def test_front_matter_of_any_kind(source: Path, case: str) -> None:
    raw, expected = MATTERS[case]
    (source / "README.md").write_bytes(raw)
    start = time.process_time()
    assert front_matter(source) == expected
    assert time.process_time() - start < 5
    made = read_matter(card(open_model(source), "int8", 8.5, []))
    assert made["tags"] == ["mlx"]
    assert {k: v for k, v in made.items() if k.startswith(("license", "language"))} == (expected or {})
    assert not (source / "hacked").exists()


def test_a_readme_that_is_none(source: Path) -> None:
    assert front_matter(source) == {}
    (source / "README.md").mkdir()
    with pytest.raises(CheckpointError, match=r"README\.md: is not a regular file"):
        front_matter(source)
    (source / "README.md").rmdir()
    with (source / "README.md").open("wb") as file:
        file.truncate(300 << 20)
    tracemalloc.start()
    assert front_matter(source) == {}
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_yaml_is_loaded_only_to_be_parsed(source: Path) -> None:
    """It is several MB; without front matter there is nothing to parse."""
    code = """
import sys
from pathlib import Path
from smolexport.conversion.model_card import front_matter
found = front_matter(Path(sys.argv[1]))
print(found, "yaml" in sys.modules)
"""
    assert python(code, str(source)).strip() == "{} False"
    (source / "README.md").write_text("# A model\n")
    assert python(code, str(source)).strip() == "{} False"
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    assert python(code, str(source)).strip() == "{'license': 'mit'} True"

"""Several sequences at once, of different lengths: what plain onnxruntime makes of padding, as README and card say.

Notation: b = batch, s = longest prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.conversion.pipeline import export
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from tests.onnx_for_tests import play, relative, session

PROMPTS = [np.arange(7, 7 + n, dtype=np.int64) for n in (20, 12, 5)]
LONGEST, NEXT = 20, (40, 50, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("batch")
    source = write_checkpoint(scratch / "smollm3", "smollm3", tokenizer=write_tokenizer(scratch / "tokenizer"))
    return export("onnx", source, scratch / "smollm3-onnx", quant="f32").path


def continued(graph: Path, *, right: bool) -> NDArray[np.float32]:
    """Logits [b, v] of a token after the padded prompts."""
    opened = session(graph)
    names = [output.name for output in opened.get_outputs()]
    ids, mask = np.zeros((2, len(PROMPTS), LONGEST), np.int64)
    for row, prompt in enumerate(PROMPTS):
        place = slice(len(prompt)) if right else slice(LONGEST - len(prompt), LONGEST)
        ids[row, place], mask[row, place] = prompt, 1
    caches: dict[str, NDArray[Any]] = {
        port.name: np.zeros((len(PROMPTS), port.shape[1], 0, port.shape[3]), np.float32)
        for port in opened.get_inputs()
        if port.name.startswith("past_key_values.")
    }
    made = dict(zip(names, opened.run(None, {"input_ids": ids, "attention_mask": mask, **caches}), strict=True))
    feeds = {
        "input_ids": np.array(NEXT, np.int64)[:, None],
        "attention_mask": np.concatenate([mask, np.ones((len(PROMPTS), 1), np.int64)], 1),
        **{name: made[name.replace("past_key_values", "present")] for name in caches},
    }
    return np.asarray(opened.run(["logits"], feeds)[0][:, -1])


def test_padding_on_the_right_changes_nothing(folder: Path) -> None:
    graph = folder / "onnx" / "model.onnx"
    rows = continued(graph, right=True)
    for row, prompt, token in zip(rows, PROMPTS, NEXT, strict=True):
        assert relative(row, play(graph, [*prompt, token])[-1]) < 1e-5


def test_padding_on_the_left_is_taken_for_text_and_the_card_says_so(folder: Path) -> None:
    """Should this ever compute the same, the card and README.md may promise it."""
    graph = folder / "onnx" / "model.onnx"
    rows = continued(graph, right=False)
    errors = [relative(r, play(graph, [*p, t])[-1]) for r, p, t in zip(rows, PROMPTS, NEXT, strict=True)]
    assert errors[0] < 1e-5  # the longest one is not padded
    assert min(errors[1:]) > 0.1
    assert "padded on the left, which this graph's attention treats as text" in (folder / "README.md").read_text()

"""Pieces of the training of scales: the loss at the head, settings, and what is said without the libraries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from smolexport.calibration.trainer import DistilSettings, held_out
from smolexport.errors import UsageError
from tests.children import python

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from smolexport_on_torch import _distil  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other busily are slow on a machine with other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


RANDOM = np.random.default_rng(7)


def predictions(count: int, vocabulary: int, k: int) -> tuple[Any, Any, Any]:
    """Log-probabilities over everything, and the likeliest k."""
    whole = torch.log_softmax(3 * torch.randn(count, vocabulary, dtype=torch.float64), -1)
    top = whole.topk(k)
    return whole, top.indices, top.values


@pytest.mark.parametrize("piece", [1, 90, 10_000])
def test_loss_with_the_whole_vocabulary_is_the_divergence(piece: int) -> None:
    whole, ids, log_probs = predictions(9, 30, 30)
    hidden = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    ours = _distil.head_divergence(hidden, head, ids, log_probs, piece)
    student = torch.log_softmax(hidden @ head.T, -1)
    theirs = (whole.exp() * (whole - student)).sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, (hidden, head)), torch.autograd.grad(theirs, (hidden, head)))


def test_loss_with_a_tail_is_the_divergence_of_its_classes() -> None:
    _, ids, log_probs = predictions(9, 30, 4)
    hidden = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    ours = _distil.head_divergence(hidden, head, ids, log_probs, 90)
    student = torch.log_softmax(hidden @ head.T, -1).gather(1, ids)
    q, p = (torch.cat([x.exp(), 1 - x.exp().sum(1, keepdim=True)], 1) for x in (student, log_probs))
    theirs = (p * (p / q).log()).sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, (hidden, head)), torch.autograd.grad(theirs, (hidden, head)))
    assert (3 * _distil.head_divergence(hidden, head, ids, log_probs)).item() == pytest.approx(3 * theirs.item())


@pytest.mark.parametrize("k", [4, 30])
def test_loss_stays_finite_where_probabilities_vanish(k: int) -> None:
    """A teacher and a student that are both certain, of different tokens; and log-probabilities rounded upwards."""
    hidden = torch.eye(30)[:3].requires_grad_()
    head = (200 * torch.eye(30)).requires_grad_()
    ids = torch.stack([torch.arange(k), torch.arange(k), (torch.arange(k) + 20) % 30])
    log_probs = torch.full((3, k), -60.0)
    log_probs[:, 0] = 1e-3
    loss = _distil.head_divergence(hidden, head, ids, log_probs)
    loss.backward()
    assert math.isfinite(loss.item())
    assert loss.item() > 50
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    sure = _distil.head_divergence(hidden[:1], head, ids[:1], log_probs[:1])
    assert sure.item() == pytest.approx(0, abs=1e-6)


def test_logits_of_a_large_vocabulary_are_never_held_together() -> None:
    """1024 positions of 64k classes are 256 MB of logits; forward and backward take a small part of it."""
    code = (
        "import resource, torch\n"
        "from smolexport_on_torch._distil import head_divergence\n"
        "torch.set_num_threads(1)\n"
        "def run(n):\n"
        "    hidden = torch.randn(n, 8, requires_grad=True)\n"
        "    ids = torch.arange(4).expand(n, 4)\n"
        "    head_divergence(hidden, head, ids, torch.full((n, 4), -2.0)).backward()\n"
        "head = torch.randn(65536, 8)\n"
        "run(16)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run(1024)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    assert int(python(code)) < 60_000  # kB


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch": 0}, {"rate": 0}, {"warm_up": 1.0}, {"patience": 0}, {"device": "tpu"}]
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"distillation: {next(iter(wrong))} = "):
        DistilSettings(**wrong)


def test_the_rate_rises_and_falls() -> None:
    settings = DistilSettings(steps=100, rate=1.0, warm_up=0.1)
    rates = [settings.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert np.argmax(rates) == 9
    assert rates[9] == pytest.approx(0.91)
    assert rates[-1] == pytest.approx(0.01)


def test_every_window_is_taken_once_a_round() -> None:
    batches = _distil._batches(10, 4, 0)
    taken = np.concatenate([next(batches) for _ in range(5)])
    assert np.bincount(taken).tolist() == [2] * 10
    assert [held_out(n) for n in (3, 16, 32, 64, 256)] == [2, 2, 2, 4, 16]
    with pytest.raises(UsageError, match="2 calibration windows"):
        held_out(2)


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_without_the_libraries_the_line_that_installs_them(library: str) -> None:
    told = python(
        f"import sys\nsys.modules[{library!r}] = None\n"
        "from smolexport.errors import MissingDependencyError\n"
        "try:\n    from smolexport_on_torch import trainer\n"
        "except MissingDependencyError as error:\n    print(error)"
    )
    assert "pip install torch transformers" in told
    assert len(told.splitlines()) == 1

"""Scale distillation: its gradients, its loss, and what it does to models that are really trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from smolexport.calibration.trainer import Distilled, DistilSettings, Step, Trained
from smolexport.errors import TensorError, UsageError
from smolexport.testing.checkpoints import write_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from smolexport_on_torch import _distil, _factors, trainer  # noqa: E402
from smolexport_on_torch._load import load_model  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other busily are slow on a machine with other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


RANDOM = np.random.default_rng(7)
F32 = NDArray[np.float32]
QUICK = DistilSettings(steps=6, batch=4, rate=1e-2, validate_every=3, threads=1, device="cpu")


@dataclass(frozen=True)
class Blocks:
    a: F32
    d: F32
    b: F32 | None
    m: F32 | None
    block: int


@dataclass(frozen=True)
class Predictions:
    ids: NDArray[Any]
    log_probs: NDArray[Any]


def half(name: str, factors: Trained) -> Trained:
    """Rounds to float16, the type of the scales of most formats."""
    with np.errstate(over="ignore"):
        d, m = (x if x is None else x.astype(np.float16).astype(np.float32) for x in (factors.d, factors.m))
    return Trained(d, m)


def blocks_like(kind: str, rows: int = 6, columns: int = 64) -> Blocks:
    """The shapes that formats have: no minimum, per block, per part of one, per column; short."""
    block = {"parts": 32}.get(kind, 16)
    groups = -(-columns // block)
    a = RANDOM.integers(-8, 8, (rows, columns)).astype(np.float32) * (100 if kind == "parts" else 1)
    d, m = (RANDOM.uniform(0.5, 1.5, (rows, groups)).astype(np.float32) for _ in range(2))
    b = {
        "none": None,
        "constant": np.ones((rows, columns)),
        "parts": np.repeat(RANDOM.integers(0, 64, (rows, columns // 8)), 8, axis=1),
        "columns": RANDOM.normal(size=(rows, columns)),
    }[kind]
    return Blocks(a, d, None if b is None else b.astype(np.float32), None if b is None else m, block)


SHAPES = [
    ("none", 64),
    ("constant", 64),
    ("parts", 64),
    ("columns", 64),
    ("none", 40),
    ("constant", 40),
    ("columns", 40),
]


def plain(blocks: Blocks, d: Any, m: Any) -> Any:
    """The matrix, in the plainest torch."""
    columns = blocks.a.shape[1]
    made = torch.from_numpy(blocks.a) * d.repeat_interleave(blocks.block, 1)[:, :columns]
    if blocks.b is not None:
        made = made - torch.from_numpy(blocks.b) * m.repeat_interleave(blocks.block, 1)[:, :columns]
    return made


@pytest.mark.parametrize(("kind", "columns"), SHAPES)
def test_gradients_are_those_of_autograd(kind: str, columns: int) -> None:
    blocks = blocks_like(kind, columns=columns)
    codes = _factors.Codes(blocks)
    x = torch.randn(2, 3, columns, dtype=torch.float64, requires_grad=True)
    d = torch.from_numpy(blocks.d).double().requires_grad_()
    m = None if blocks.m is None else torch.from_numpy(blocks.m).double().requires_grad_()
    weights = torch.randn(2, 3, 6, dtype=torch.float64)
    inputs = [t for t in (x, d, m) if t is not None]
    ids = torch.tensor([4, 0, 4])
    truth = plain(blocks, d, m)
    for made, expected in (
        (_factors.Product.apply(x, d, m, codes), x @ truth.T),
        (x @ _factors.Matrix.apply(d, m, codes).T, x @ truth.T),
        (x + codes.rows(ids, d, m), x + truth[ids]),
    ):
        scale = weights if made.shape == weights.shape else torch.ones_like(made)
        torch.testing.assert_close(made, expected)
        ours = torch.autograd.grad((made * scale).sum(), inputs, retain_graph=True)
        theirs = torch.autograd.grad((expected * scale).sum(), inputs, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


def test_frozen_input_and_frozen_factors_cost_no_gradient() -> None:
    codes, blocks = _factors.Codes(blocks_like("none")), blocks_like("none")
    d = torch.from_numpy(blocks.d).requires_grad_()
    _factors.Product.apply(torch.ones(2, 64), d, None, codes).sum().backward()
    assert d.grad is not None
    x = torch.ones(2, 64, requires_grad=True)
    _factors.Product.apply(x, d.detach(), None, codes).sum().backward()
    torch.testing.assert_close(x.grad[0], codes.matrix(d.detach(), None).sum(0))


@pytest.mark.parametrize(
    ("kind", "a", "b"),
    [
        ("none", torch.int8, None),
        ("constant", torch.int8, (torch.int8, 1)),
        ("parts", torch.int16, (torch.int8, 4)),
        ("columns", torch.int8, (torch.float32, 16)),
    ],
)
def test_codes_are_kept_small(kind: str, a: Any, b: tuple[Any, int] | None) -> None:
    codes = _factors.Codes(blocks_like(kind))
    assert codes.a.dtype == a
    assert (codes.b is None) if b is None else (codes.b.dtype, codes.b.shape[2]) == b
    halves = replace(blocks_like("none"), a=np.full((6, 64), 0.5, np.float32))
    assert _factors.Codes(halves).a.dtype == torch.float16


@pytest.mark.parametrize(("kind", "columns"), [s for s in SHAPES if s[0] != "none"])
def test_scale_and_minimum_are_trained_apart(kind: str, columns: int) -> None:
    """The start is the given factors to the bit; what a scale changes has no part along b, which is the minimum's."""
    blocks = blocks_like(kind, columns=columns)
    scaled = _factors.Scaled(blocks)
    before = scaled.trained()
    np.testing.assert_array_equal(before.d, blocks.d)
    assert before.m is not None
    assert blocks.b is not None
    np.testing.assert_array_equal(before.m, blocks.m)
    start = scaled.matrix().detach()
    with torch.no_grad():
        scaled.d_log.add_(0.1)
    change = (scaled.matrix().detach() - start).numpy()
    starts = np.arange(0, columns, blocks.block)
    along = np.add.reduceat(change * blocks.b, starts, axis=1)
    most = np.add.reduceat(np.abs(change * blocks.b), starts, axis=1)
    assert (np.abs(along) <= 1e-3 * most + 1e-6).all()
    with torch.no_grad():
        scaled.d_log.zero_()
        scaled.m_move.add_(0.01)
    moved = (scaled.matrix().detach() - start).numpy()
    sizes = [np.sqrt(np.add.reduceat(x * x, starts, axis=1)) for x in (moved, change)]
    np.testing.assert_allclose(sizes[0] / 0.01, sizes[1] / math.expm1(0.1), rtol=1e-3)


def quantized(weight: F32, minimum: bool = False) -> Blocks:
    """Plain 4-bit rounding in blocks of 32, scales in float16."""
    cut = weight.reshape(len(weight), -1, 32)
    if minimum:
        low = cut.min(-1).clip(max=0).astype(np.float16).astype(np.float32)
        d = ((cut.max(-1) - low) / 15).astype(np.float16).astype(np.float32)
        a = ((cut - low[..., None]) / d[..., None]).round().clip(0, 15)
        return Blocks(a.reshape(weight.shape), d, np.ones_like(weight), -low, 32)
    peak = np.take_along_axis(cut, np.abs(cut).argmax(-1)[..., None], -1)[..., 0]
    d = (peak / -8).astype(np.float16).astype(np.float32)
    return Blocks((cut / d[..., None]).round().clip(-8, 7).reshape(weight.shape), d, None, None, 32)


class Case:
    """A checkpoint, its quantized matrices, and what it predicts on some windows."""

    def __init__(self, folder: Path, windows: NDArray[np.int32], k: int, extra: tuple[str, ...] = ()) -> None:
        self.folder, self.windows = folder, windows
        model = load_model(folder, "f32", None)
        state = {name: np.array(value, np.float32) for name, value in self.state(folder).items()}
        self.trained = {n: quantized(v) for n, v in state.items() if n.endswith("proj.weight") or n in extra}
        self.frozen = {n: v for n, v in state.items() if n not in self.trained}
        with torch.inference_mode():
            logits = torch.cat([model(torch.from_numpy(w[None]).long()).logits for w in windows])
        top = torch.log_softmax(logits, -1).topk(k)
        self.teacher = Predictions(top.indices.int().numpy(), top.values.half().numpy())

    @staticmethod
    def state(folder: Path) -> Mapping[str, Any]:
        return {n: v.astype(np.float32) for n, v in load_file(folder / "model.safetensors").items()}

    def run(self, settings: DistilSettings = QUICK, **options: Any) -> Distilled:
        return trainer.distil(
            self.folder, self.frozen.items(), options.pop("trained", self.trained), self.windows, self.teacher,
            settings=settings, **{"rounded": half, **options},
        )  # fmt: skip

    def judge(self, factors: Mapping[str, Trained]) -> float:
        """The divergence on the held-out windows, from a student of its own."""
        start = {n: replace(b, d=factors[n].d, m=factors[n].m) for n, b in self.trained.items()}
        return self.run(replace(QUICK, steps=1, rate=1e-9), trained=start).before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_checkpoint(tmp_path_factory.mktemp("distil") / "tiny", "llama", num_hidden_layers=2)
    windows = np.random.default_rng(3).integers(0, 320, (14, 24)).astype(np.int32)
    return Case(folder, windows, 64)


@pytest.fixture(scope="module")
def real(demo: Path) -> Case:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    ids = np.array(tokenizer.encode((demo / "held_out.txt").read_text(encoding="utf-8")).ids, np.int32)
    return Case(demo, ids[: 40 * 128].reshape(-1, 128), 256)


def test_a_few_steps_bring_the_demo_model_closer_to_its_original(real: Case) -> None:
    seen: list[Step] = []
    done = real.run(
        DistilSettings(steps=16, batch=4, rate=5e-3, validate_every=4, threads=1, device="cpu"), progress=seen.append
    )
    assert done.improved
    assert done.after < 0.9 * done.before
    assert tuple(seen) == done.history
    assert [s.number for s in seen] == list(range(1, 17))
    assert [s.number for s in seen if s.validation is not None] == [4, 8, 12, 16]
    assert done.after == min(s.validation for s in seen if s.validation is not None)
    assert (done.ended, done.device, done.tokens) == ("steps", "cpu", 16 * 4 * 128)
    assert f"{done.before:.5f} -> {done.after:.5f}" in str(done)
    for name, made in done.factors.items():
        assert made.d.shape == real.trained[name].d.shape
        np.testing.assert_array_equal(made.d, made.d.astype(np.float16).astype(np.float32))
        assert not np.array_equal(made.d, real.trained[name].d)
    assert real.judge(done.factors) == pytest.approx(done.after, rel=1e-4)


def test_minima_are_trained_too(real: Case) -> None:
    trained = {n: quantized(real.state(real.folder)[n], minimum=True) for n in real.trained}
    done = real.run(replace(QUICK, steps=12, rate=5e-3, validate_every=12), trained=trained)
    assert done.after < 0.9 * done.before
    for name, made in done.factors.items():
        assert made.m is not None
        assert not np.array_equal(made.m, trained[name].m)


def test_rounded_values_are_what_is_judged(tiny: Case) -> None:
    """With a type of few digits: what comes back is rounded, and its divergence is that of the rounded values."""

    def coarse(name: str, factors: Trained) -> Trained:
        assert name in tiny.trained
        mantissa, exponent = np.frexp(factors.d)
        return Trained(np.ldexp(np.round(mantissa * 64) / 64, exponent).astype(np.float32), None)

    done = tiny.run(replace(QUICK, steps=12), rounded=coarse)
    expected = done.factors if done.improved else {n: Trained(b.d, b.m) for n, b in tiny.trained.items()}
    assert tiny.judge(expected) == pytest.approx(done.after, rel=1e-5)
    if done.improved:
        for name, made in done.factors.items():
            np.testing.assert_array_equal(made.d, coarse(name, made).d)


@pytest.mark.parametrize(("rate", "ended"), [(3.0, {"steps", "patience", "diverged"}), (1e6, {"diverged"})])
def test_an_absurd_rate_is_rolled_back(tiny: Case, rate: float, ended: set[str]) -> None:
    done = tiny.run(replace(QUICK, rate=rate, warm_up=0.0))
    assert not done.improved
    assert done.ended in ended
    assert done.after == done.before
    assert str(done).startswith("rolled back to the start")
    for name, made in done.factors.items():
        np.testing.assert_array_equal(made.d, tiny.trained[name].d)


def test_a_seed_decides_everything(tiny: Case) -> None:
    first, again, other = (tiny.run(replace(QUICK, seed=seed)) for seed in (1, 1, 2))
    assert first.history == again.history
    for name, made in first.factors.items():
        np.testing.assert_array_equal(made.d, again.factors[name].d)
    assert first.history != other.history


def test_training_ends_when_nothing_gets_better(tiny: Case) -> None:
    start = {n: Trained(b.d, b.m) for n, b in tiny.trained.items()}
    settings = replace(QUICK, steps=60, validate_every=2, patience=3)
    done = tiny.run(settings, rounded=lambda name, _: start[name])
    assert (len(done.history), done.ended, done.best) == (6, "patience", 0)


def test_little_memory_changes_nothing_but_time(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = _distil.checkpoint

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(_distil, "checkpoint", counted)
    rich = tiny.run(QUICK)
    assert not calls
    poor = tiny.run(replace(QUICK, memory=1))
    assert len(calls) >= 2 * 4 * QUICK.steps  # layers, windows of a batch
    for one, two in zip(rich.history, poor.history, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "smollm3"])
def test_embeddings_heads_and_biases(tmp_path: Path, model_type: str, tied: bool) -> None:
    """The gradient of the factors is that of transformers' own model with plain weights."""
    folder = write_checkpoint(tmp_path / "x", model_type, num_hidden_layers=2, tie_word_embeddings=tied)
    extra = ("model.embed_tokens.weight", "lm_head.weight")
    case = Case(folder, np.random.default_rng(5).integers(0, 320, (4, 12)).astype(np.int32), 320, extra)
    student = _distil.Student(folder, case.frozen.items(), case.trained, torch.device("cpu"))
    assert len(student.scaled) == 14 + (1 if tied else 2)
    chosen = np.arange(4)
    ours = student.divergence(case.windows, case.teacher, chosen)
    ours.backward()
    values = {n: plain(b, torch.from_numpy(b.d), None) for n, b in case.trained.items()}
    model = load_model(folder, "f32", [*case.frozen.items(), *((n, v.numpy()) for n, v in values.items())])
    logits = model(torch.from_numpy(case.windows).long()).logits
    student_log, teacher = torch.log_softmax(logits, -1), torch.zeros_like(logits)
    teacher.scatter_(-1, torch.from_numpy(case.teacher.ids).long(), torch.from_numpy(case.teacher.log_probs).float())
    teacher = torch.log_softmax(teacher, -1)
    theirs = (teacher.exp() * (teacher - student_log)).sum()
    theirs.backward()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-3)
    for name, scaled in student.scaled.items():
        expected = scaled.codes.gradients(model.get_parameter(name).grad)[0] * scaled.d
        torch.testing.assert_close(scaled.d_log.grad, expected, rtol=1e-3, atol=1e-3)


def test_the_twin_trains_alike() -> None:
    """A SmolLM3, one layer of it without rotation."""
    folder = Path(__file__).parents[1] / "fixtures" / "smollm3_twin"
    windows = np.random.default_rng(3).integers(3, 4096, (18, 64)).astype(np.int32)
    done = Case(folder, windows, 256).run(replace(QUICK, rate=5e-3))
    assert done.after < 0.97 * done.before


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda c: setattr(c, "windows", c.windows[:2]), UsageError, ["2 calibration windows", "3 are the least"]),
        (lambda c: setattr(c, "windows", c.windows[:, :9]), UsageError, ["expected windows [n, w] and a teacher of"]),
        (lambda c: c.frozen.update({next(iter(c.trained)): 0}), UsageError, ["is given as frozen and as trained"]),
        (lambda c: c.frozen.pop("model.norm.weight"), TensorError, ["'model.norm.weight' is missing"]),
        (lambda c: c.trained.update({"model.x.weight": quantized(np.ones((4, 32), np.float32))}), TensorError,
         ["'model.x.weight' is not part of this architecture"]),
        (lambda c: c.trained.update({"model.norm.weight": c.frozen_matrix()}), TensorError, ["model.norm.weight"]),
    ],
)  # fmt: skip
def test_refusals(tiny: Case, change: Callable[[Any], Any], error: type[Exception], words: list[str]) -> None:
    class Copy(Case):
        def __init__(self) -> None:
            self.folder, self.windows, self.teacher = tiny.folder, tiny.windows, tiny.teacher
            self.trained, self.frozen = dict(tiny.trained), dict(tiny.frozen)

        def frozen_matrix(self) -> Blocks:
            del self.frozen["model.norm.weight"]
            return quantized(np.ones((2, 32), np.float32))

    case = Copy()
    change(case)
    if len(case.windows) == 2:
        case.teacher = Predictions(case.teacher.ids[:2], case.teacher.log_probs[:2])
    with pytest.raises(error) as told:
        case.run()
    assert len(str(told.value).splitlines()) == 1
    for word in words:
        assert word in str(told.value)


def test_no_gpu_is_said(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device = cuda, and torch finds none"):
        tiny.run(replace(QUICK, device="cuda"))
    assert tiny.run(replace(QUICK, steps=1, device="auto")).device == "cpu"


def test_threads_are_put_back(tiny: Case) -> None:
    before = torch.get_num_threads()
    tiny.run(replace(QUICK, steps=1, threads=1 if before > 1 else 2))
    assert torch.get_num_threads() == before

"""What every converter must do: tests to subclass.

    class TestMyFormat(ConverterTests):
        converter: ClassVar[Converter] = smolexport_to_mine
        exact = "f32"
        coarse: ClassVar = {"q8": 0.01, "q4": 0.12}

Needs pytest.  The checkpoints are tiny and random, one per architecture that the converter does not refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.calibration.bit_allocation import bit_choices_of
from smolexport.conversion import portable
from smolexport.conversion.converter import Converter
from smolexport.conversion.pipeline import write
from smolexport.conversion.plan import Plan
from smolexport.conversion.prepare import Job
from smolexport.errors import OutputError, TensorError, UsageError
from smolexport.model.arch import architectures
from smolexport.model.checkpoint import Checkpoint, open_checkpoint
from smolexport.model.spec import Role, Tensor
from smolexport.model.weights import fingerprint, read_back
from smolexport.testing.checkpoints import model_of, write_checkpoint, write_tokenizer

READ_ALIKE = (Role.GATE, Role.UP)
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}


class ConverterTests:
    """Conformance of one converter over all architectures.

    Attributes:
        converter: the converter's module.
        exact: a scheme that keeps every float32 value.
        coarse: lossy schemes, each with the largest relative error (Frobenius) of any tensor.
    """

    converter: ClassVar[Converter]
    exact: ClassVar[str] = "f32"
    coarse: ClassVar[dict[str, float]] = {}

    @pytest.fixture(params=architectures())
    def checkpoint(self, request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
        """A tiny checkpoint of each architecture."""
        tokenizer = write_tokenizer(tmp_path / "tokenizer")
        sizes = {k: v for k, v in WIDE.items() if request.param != "smollm3" or k != "num_hidden_layers"}
        folder = write_checkpoint(tmp_path / "model", request.param, seed=4, tokenizer=tokenizer, **sizes)
        return open_checkpoint(folder)

    def planned(self, checkpoint: Checkpoint, scheme: str) -> Plan:
        """The plan of `checkpoint` in `scheme`; skips the test if the format refuses the architecture."""
        reasons = self.converter.check(checkpoint.spec)
        if reasons:
            pytest.skip(f"{self.converter.FORMAT}: {reasons[0]}")
        return self.converter.plan(model_of(checkpoint), scheme)

    def write(self, plan: Plan, checkpoint: Checkpoint, path: Path, **options: Any) -> list[Path]:
        """Write a plan as an export does; returns the files."""
        return list(write(Job(self.converter, checkpoint, plan, path), **options).files)

    def decoded(
        self, path: Path, checkpoint: Checkpoint
    ) -> Iterator[tuple[Tensor, NDArray[np.float32], NDArray[np.float32]]]:
        """Every tensor of `path`, its decoded values and those of the checkpoint."""
        for tensor, values in read_back(self.converter.weights(path), path, checkpoint.spec):
            yield tensor, values, checkpoint.stored[tensor].read_rows().astype(np.float32).reshape(tensor.shape)

    @pytest.fixture
    def target(self, tmp_path: Path) -> Path:
        """The path of the output."""
        return tmp_path / f"out{self.converter.SUFFIX}"

    def test_default_is_a_scheme(self) -> None:
        """The default and every listed scheme are found by name; others are refused."""
        assert self.converter.find_scheme(self.converter.DEFAULT).name in self.converter.SCHEMES
        for name, scheme in self.converter.SCHEMES.items():
            assert self.converter.find_scheme(name).name == name
            assert scheme.about
        with pytest.raises(UsageError):
            self.converter.find_scheme("no such scheme")

    def test_plan_names_every_tensor_once_and_writes_nothing(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        """The plan has all tensors of the spec, under distinct names, in formats that fit."""
        before = sorted(tmp_path.rglob("*"))
        plan = self.planned(checkpoint, self.converter.DEFAULT)
        assert {e.tensor for e in plan.entries if e.tensor} == set(checkpoint.spec.tensors())
        assert len({e.name for e in plan.entries}) == len(plan.entries)
        assert all(e.format.fits(e.shape[-1]) for e in plan.entries)
        assert plan.render()
        assert sorted(tmp_path.rglob("*")) == before

    def test_exact_scheme_gives_every_value_back(self, checkpoint: Checkpoint, target: Path) -> None:
        """Reading back inverts every renaming, reordering and cast."""
        plan = self.planned(checkpoint, self.exact)
        self.write(plan, checkpoint, target, threads=2)
        seen = set()
        for tensor, values, original in self.decoded(target, checkpoint):
            np.testing.assert_array_equal(values, original)
            seen.add(tensor)
        assert seen == set(checkpoint.spec.tensors())
        assert fingerprint(self.converter.weights(target)) == fingerprint(checkpoint.stored)

    def test_rows_are_read_in_any_pieces(self, checkpoint: Checkpoint, target: Path) -> None:
        """Any range of rows of any tensor equals the same range of the whole."""
        plan = self.planned(checkpoint, self.converter.DEFAULT)
        self.write(plan, checkpoint, target)
        for tensor, stored in self.converter.weights(target).items():
            whole = stored.read_rows()
            assert whole.shape == (tensor.rows, tensor.columns)
            for start, stop in ((0, 1), (1, 2), (len(whole) // 3, len(whole) - 1), (len(whole) - 1, len(whole))):
                if 0 <= start < stop <= len(whole):
                    np.testing.assert_array_equal(stored.read_rows(start, stop), whole[start:stop])

    def test_portable_schemes_are_kept(self, checkpoint: Checkpoint, target: Path) -> None:
        """A file in `int4` or `int8` holds exactly the weights that `conversion.portable` defines."""
        for scheme in portable.SCHEMES.keys() & self.converter.SCHEMES.keys():
            plan = self.planned(checkpoint, scheme)
            self.write(plan, checkpoint, target, force=True)
            for tensor, values, _ in self.decoded(target, checkpoint):
                canonical = portable.storage_of(tensor, scheme).canonical
                rows = checkpoint.stored[tensor].read_rows()
                defined = canonical.decode(canonical.encode(rows), rows.shape[1]).reshape(tensor.shape)
                np.testing.assert_array_equal(values, defined)

    def test_bits_are_chosen_matrix_by_matrix(self, checkpoint: Checkpoint, target: Path) -> None:
        """In `auto-bits` each matrix gets its chosen bits, and the size of the output is known beforehand."""
        if portable.AUTO_BITS not in self.converter.SCHEMES:
            pytest.skip(f"{self.converter.FORMAT} offers no {portable.AUTO_BITS}")
        bit_choices = bit_choices_of([self.converter], checkpoint.spec)
        bits = {t: found[((t.layer or 0) + (t.role in READ_ALIKE)) % len(found)] for t, found in bit_choices.items()}
        self.planned(checkpoint, self.exact)  # skips what the format refuses
        plan = self.converter.plan(replace(model_of(checkpoint), bits=bits), portable.AUTO_BITS)
        files = self.write(plan, checkpoint, target)
        assert plan.size == sum(p.stat().st_size for p in files)
        assert self.converter.describe(target).scheme == portable.AUTO_BITS
        assert self.converter.lint(target) == []
        limits = {4: 0.12, 5: 0.06, 6: 0.03, 8: 0.006}
        assert set(bits) == {t for t in checkpoint.spec.tensors() if t.is_matrix}
        for tensor, values, original in self.decoded(target, checkpoint):
            error = float(np.linalg.norm(values - original) / np.linalg.norm(original))
            assert error <= limits[bits.get(tensor, 8)], tensor
            assert tensor not in bits or error > limits[bits[tensor]] / 4, tensor
        with pytest.raises(UsageError, match="--size or --target-kld"):
            self.converter.plan(model_of(checkpoint), portable.AUTO_BITS)

    def test_coarse_schemes_stay_near(self, checkpoint: Checkpoint, target: Path) -> None:
        """Each tensor decodes to within the stated error."""
        for scheme, error in self.coarse.items():
            plan = self.planned(checkpoint, scheme)
            self.write(plan, checkpoint, target, force=True)
            for tensor, values, original in self.decoded(target, checkpoint):
                assert np.linalg.norm(values - original) <= error * np.linalg.norm(original), (scheme, tensor)

    def test_threads_do_not_change_the_output(self, checkpoint: Checkpoint, target: Path) -> None:
        """One thread and three write the same bytes; progress adds up to the plan's bytes."""
        plan = self.planned(checkpoint, self.converter.DEFAULT)
        seen: list[int] = []
        one = self.write(plan, checkpoint, target, threads=1, progress=seen.append)
        first = [p.read_bytes() for p in one]
        many = self.write(plan, checkpoint, target, threads=3, force=True)
        assert [p.read_bytes() for p in many] == first
        assert sum(seen) == plan.nbytes

    def test_output_describes_itself(self, checkpoint: Checkpoint, target: Path) -> None:
        """The output is recognised, and `describe` agrees with the plan."""
        plan = self.planned(checkpoint, self.converter.DEFAULT)
        assert not self.converter.recognises(target)
        files = self.write(plan, checkpoint, target)
        found = self.converter.describe(target)
        assert self.converter.recognises(target)
        assert (found.format, found.scheme) == (self.converter.FORMAT, plan.scheme)
        assert found.weights == plan.weights
        assert found.bits_per_weight == pytest.approx(plan.bits_per_weight)
        assert found.bytes == sum(f.stat().st_size for f in files) == plan.size >= plan.nbytes
        assert self.converter.lint(target) == []

    def test_existing_output_is_kept_without_force(self, checkpoint: Checkpoint, target: Path) -> None:
        """A second write is refused and changes nothing."""
        plan = self.planned(checkpoint, self.converter.DEFAULT)
        files = self.write(plan, checkpoint, target)
        before = [p.read_bytes() for p in files]
        with pytest.raises(OutputError):
            self.write(plan, checkpoint, target)
        assert [p.read_bytes() for p in files] == before

    def test_weights_that_are_not_finite_leave_nothing_behind(
        self, checkpoint: Checkpoint, target: Path, tmp_path: Path
    ) -> None:
        """A NaN in the last tensor is an error that names it, and no file appears."""
        plan = self.planned(checkpoint, self.converter.DEFAULT)
        last = next(e.tensor for e in reversed(plan.entries) if e.tensor is not None)
        stored = checkpoint.stored[last]
        with stored.path.open("r+b") as file:
            file.seek(stored.offset)
            file.write(np.full(1, np.nan, stored.dtype).tobytes())
        before = sorted(tmp_path.iterdir())
        with pytest.raises(TensorError, match=last.name):
            self.write(plan, checkpoint, target)
        assert sorted(tmp_path.iterdir()) == before

"""Gates of all kinds of nonsense: read, or refused in one line that names the file."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from smolexport.errors import UsageError
from smolexport.parity.thresholds import Thresholds, read_gate
from tests.cli.commands import assert_refused, call
from tests.clocks import at_most
from tests.mutations import changed_bytes, read_or_refused

MUTATIONS = 400
WHOLE = """[default]
max_kld = 0.05
min_top1 = 0.9
[int4]
max_exporter_kld = 0.001
[gguf]
max_ppl_ratio = 1.03
[gguf.q4_k_m]
max_kld = 2
"""
VALUES = (
    "nan", "inf", "-inf", "-1", "-0.0", "1e400", "0.5", "1", "1" + "0" * 400, "9" * 5000, "0x" + "f" * 400, "true",
    '"0.1"', "[]",
    "[0.1]", "[" * 200 + "]" * 200, "[" * 5000 + "]" * 5000, "{}", "{a = 1}", "{a = " * 90 + "1" + "}" * 90,
    "1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", '"' + "x" * 100_000 + '"', '"\\u0000\\u001b[2J\\u202e"',
)  # fmt: skip
NAMES = (
    "default", "gguf", "mlx", "int4", "gguf.int4", "gguf.gguf", "default.default", "max_kld", '""', '"\\u001b[2J"',
    "x" * 20_000, ".".join("a" * 300), '"' + "+" * 3000 + '"', "int4.int4", "q4_k_m", "onnx.int4+int8",
)  # fmt: skip


def damaged(random: Random) -> bytes:
    """`WHOLE` with a value, a key or a table's name that is none, or with damaged bytes."""
    lines = WHOLE.splitlines()
    if random.random() < 0.3:
        return changed_bytes(random, WHOLE.encode())
    for _ in range(random.choice((1, 1, 2))):
        place = random.randrange(len(lines))
        key, equals, value = lines[place].partition(" = ")
        if not equals:
            lines[place] = f"[{random.choice(NAMES)}]"
        elif random.random() < 0.7:
            lines[place] = f"{key} = {random.choice(VALUES)}"
        else:
            lines[place] = f"{random.choice(NAMES)} = {value}"
    return "\n".join(lines).encode()


def test_gates_with_any_part_changed(tmp_path: Path) -> None:
    path, random, refused = tmp_path / "parity.toml", Random(6), 0
    for _ in range(MUTATIONS):
        path.write_bytes(damaged(random))
        with at_most(30):
            refused += read_or_refused(lambda: read_gate(path), path)
    assert 0.5 < refused / MUTATIONS < 0.95


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_thresholds_of_every_kind(value: str, tmp_path: Path) -> None:
    path = tmp_path / "parity.toml"
    path.write_text(f"[default]\nmax_kld = {value}\n")
    if value in ("-0.0", "0.5", "1"):
        assert read_gate(path).overridden(Thresholds()).max_kld == float(value)
    else:
        assert_refused(call("compare", "demo", "x.gguf", "--gate", path), path)


def test_the_largest_thresholds_can_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "parity.toml"
    path.write_text(f"[default]\nmax_kld = {10**300}\n")
    assert f"{read_gate(path).max_kld:g}" == "1e+300"
    path.write_text(f"[default]\nmax_kld = {10**309}\n")
    with pytest.raises(UsageError, match="must be a number, at least 0"):
        read_gate(path)

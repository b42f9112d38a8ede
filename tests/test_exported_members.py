"""The face: what `smolexport` shows is what it says it shows."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import smolexport
from tests.children import python

MODULES = sorted(
    ".".join(p.relative_to(Path(smolexport.__file__).parents[1]).with_suffix("").parts).removesuffix(".__init__")
    for p in Path(smolexport.__file__).parent.rglob("*.py")
    if "testing" not in p.parts and not any(part.startswith("_") and part != "__init__.py" for part in p.parts)
)


def test_every_name_is_there() -> None:
    for name in smolexport.__all__:
        assert getattr(smolexport, name) is not None
    assert set(smolexport.__all__) <= set(dir(smolexport))
    assert not hasattr(smolexport, "no_such_name")
    with pytest.raises(AttributeError, match="module 'smolexport' has no attribute 'no_such_name'"):
        _ = smolexport.no_such_name


def test_types_and_runtime_agree() -> None:
    """What type checkers see under TYPE_CHECKING is what `__getattr__` serves."""
    tree = ast.parse(Path(smolexport.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("smolexport.")
        for alias in node.names
    }
    assert seen == {name: f"smolexport.{home}" for home, names in smolexport._HOMES.items() for name in names}
    assert sorted(seen) == sorted(smolexport.__all__)


def test_verbs_stay_functions_whatever_was_imported_before() -> None:
    """A submodule of a function's name would take its place once it is imported."""
    code = (
        "import importlib, pkgutil, smolexport\n"
        "for module in pkgutil.iter_modules(smolexport.__path__):\n"
        "    if module.name != 'testing':\n"
        "        importlib.import_module(f'smolexport.{module.name}')\n"
        "print(*(n for n in smolexport.__all__ if type(getattr(smolexport, n)).__name__ == 'module'))"
    )
    assert python(code).strip() == ""


@pytest.mark.parametrize("name", MODULES)
def test_public_modules_import_alone(name: str) -> None:
    importlib.import_module(name)


def test_verbs_from_python(tmp_path: Path) -> None:
    """The example of the package's docstring, on a tiny checkpoint."""
    from tests.cli.commands import tiny_checkpoint

    folder = tiny_checkpoint(tmp_path)
    ticks: list[int] = []
    done = smolexport.export("gguf", folder, tmp_path / "x.gguf", quant="q8_0", progress=ticks.append)
    assert sum(ticks) == done.plan.nbytes
    assert done.files == (done.path,)
    assert done.bytes == done.path.stat().st_size
    assert smolexport.inspect(done.path).bits_per_weight == pytest.approx(done.plan.bits_per_weight)
    with pytest.raises(smolexport.SmolexportError, match="exists already"):
        smolexport.export("gguf", folder, tmp_path / "x.gguf", quant="q8_0")
    spec = smolexport.load_spec({**__import__("json").loads((folder / "config.json").read_text())})
    assert isinstance(spec, smolexport.ModelSpec)

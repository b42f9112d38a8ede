"""The house rules: which floor may stand on which, what a file may hold, what an import may cost.

Floors, ground first; a module imports from its own floor or a lower one.  Converters and runtimes stand on the core
and are found by their names; nothing in the core names them.  One whose name extends another's may use what that one
shows: a second player of the same files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from smolexport.model.arch import architectures, load_spec
from smolexport.testing.checkpoints import tiny_config
from tests.children import python
from tests.cli.commands import SOURCES, START, tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
HEAVY = set("torch transformers onnx onnxruntime onnxruntime_genai mlx mlx_lm llama_cpp coremltools tensorflow".split())
# The first matching prefix decides.
FLOORS = (
    ("smolexport.cli", 8),
    ("smolexport.api", 7),
    ("smolexport.sweep", 6),
    ("smolexport.parity", 5),
    ("smolexport.conversion.pipeline", 4),
    ("smolexport.conversion.prepare", 4),
    ("smolexport.calibration", 5),
    ("smolexport.plugins", 3),
    ("smolexport.recipe", 2),
    ("smolexport.conversion", 2),
    ("smolexport.run", 2),
    ("smolexport.tokenizer", 1),
    ("smolexport.model", 1),
    ("smolexport.quant", 1),
    ("smolexport.text", 0),
    ("smolexport.files", 0),
    ("smolexport.cleanup", 0),
    ("smolexport.heap", 0),
    ("smolexport.processes", 0),
    ("smolexport.protobuf", 0),
    ("smolexport.errors", 0),
    ("smolexport.demo", 0),
)
FREE = ("smolexport.testing",)  # for tests: may use anything


@cache
def modules() -> dict[str, Path]:
    """Module name -> file, of all product code."""
    found = {}
    for base in (ROOT, ROOT / "converters", ROOT / "runtimes"):
        packages = [p for p in base.iterdir() if p.name.startswith("smolexport") and (p / "__init__.py").exists()]
        for path in (file for package in packages for file in package.rglob("*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def imports(name: str, *, top_level: bool = False) -> Iterator[str]:
    """Names of the modules that a module imports; at its top level only, or anywhere but under TYPE_CHECKING."""
    for node in walk(tree(name), top_level):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import in line {node.lineno}"
            base = node.module or ""
            yield from (f"{base}.{a.name}" if f"{base}.{a.name}" in modules() else base for a in node.names)


def walk(node: ast.AST, top_level: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if top_level and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        yield from walk(child, top_level)


def floor(name: str) -> int:
    return next((level for prefix, level in FLOORS if name == prefix or name.startswith(prefix + ".")), 99)


CORE = sorted(n for n in modules() if n.split(".")[0] == "smolexport")
ADAPTERS = sorted(set(modules()) - set(CORE))


def test_there_is_a_house() -> None:
    assert len(CORE) > 50
    assert {"smolexport_to_gguf", "smolexport_to_mlx", "smolexport_to_onnx"} <= set(ADAPTERS)
    runtimes = ("torch", "llamacpp", "mlx", "onnxruntime", "onnxruntime_genai")
    assert {f"smolexport_on_{name}" for name in runtimes} <= set(ADAPTERS)


@pytest.mark.parametrize("name", CORE)
def test_core_module_keeps_its_floor(name: str) -> None:
    if name.startswith(FREE):
        return
    for target in imports(name):
        package = target.split(".")[0]
        assert not package.startswith(("smolexport_to_", "smolexport_on_")), f"the core names {target}"
        assert package not in HEAVY, f"the core imports {target}"
        if package == "smolexport" and name != "smolexport" and target != "smolexport":
            assert floor(name) < 99, f"{name} has no floor: add it to FLOORS"
            # `find_checkpoint("demo")` and the default text are the two doors downstairs.
            assert floor(target) <= floor(name), (
                f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})"
            )


def test_the_export_is_handed_its_method() -> None:
    """Nothing that plans or writes an export imports calibration, and the core names no library of a trainer."""
    for name in CORE:
        if name == "smolexport.recipe" or name.startswith("smolexport.conversion"):
            assert not [target for target in imports(name) if target.startswith("smolexport.calibration")]
    for name in CORE:
        assert '"torch"' not in modules()[name].read_text(encoding="utf-8"), name


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_do_not_know_each_other(name: str) -> None:
    own = name.split(".", maxsplit=1)[0]
    for target in imports(name):
        package, *inside = target.split(".")
        extended = own.startswith(package + "_") and not any(part.startswith("_") for part in inside)
        assert not package.startswith("smolexport_") or package == own or extended, f"{name} imports {target}"
        if own.startswith("smolexport_to_"):
            assert package not in HEAVY - {"onnx"}, f"{name} imports {target}"
            assert not target.startswith(("smolexport.cli", "smolexport.parity", "smolexport.conversion.pipeline")), (
                target
            )


@pytest.mark.parametrize("name", sorted(modules()))
def test_templates_of_strangers_run_in_one_place(name: str) -> None:
    """Whatever opens or renders a chat template is called by the process that has a clock and a limit of memory."""
    calls = [node.func for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]
    named = {ast.unparse(function).rpartition(".")[2] for function in calls}
    renders = named & {"open_chat", "apply_chat_template", "Jinja2ChatFormatter"}
    allowed = ("smolexport.run.chat", "smolexport.run.chat_process")
    assert not renders or name in allowed or name.endswith("._chat"), f"{name} calls {renders}"


def test_no_cycles_at_module_level() -> None:
    edges = {n: {t for t in imports(n, top_level=True) if t in modules() and t != n} for n in modules()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in edges[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(modules()))
def test_file(name: str) -> None:
    """Length, functions, docstring, forbidden words."""
    text = modules()[name].read_text(encoding="utf-8")
    assert text.count("\n") <= 500, f"{name} has {text.count(chr(10))} lines"
    private = any(part.startswith("_") for part in name.split("."))
    assert private or ast.get_docstring(tree(name)), f"{name} has no docstring"
    product = not name.startswith(FREE)
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 50, f"{name}.{node.name} has {length} lines"
        if isinstance(node, ast.Assert):
            assert not product, f"{name}: assert in line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert name == "smolexport.cli", f"{name}: print in line {node.lineno}"


def test_a_name_is_defined_in_one_wing() -> None:
    """`api` shows what the wings define; `main` is how a child process starts."""
    wings: dict[str, set[str]] = {}
    for name in CORE:
        wing = ".".join(name.split(".")[:2])
        for node in tree(name).body if wing not in ("smolexport", "smolexport.api") else ():
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                wings.setdefault(node.name, set()).add(wing)
    assert {name: found for name, found in wings.items() if len(found) > 1 and name != "main"} == {}


def test_every_package_is_typed() -> None:
    for base in (
        ROOT / "smolexport",
        *(ROOT / "converters").glob("smolexport_*"),
        *(ROOT / "runtimes").glob("smolexport_*"),
    ):
        assert (base / "py.typed").is_file(), f"{base.name} lacks py.typed"


@pytest.mark.parametrize("model_type", architectures())
def test_an_architecture_is_one_short_file_that_every_converter_knows(model_type: str) -> None:
    import smolexport_to_gguf
    import smolexport_to_mlx
    import smolexport_to_onnx

    lines = len((ROOT / "smolexport" / "model" / "arch" / f"{model_type}.py").read_text().splitlines())
    assert 10 <= lines <= 60
    spec = load_spec(tiny_config(model_type))
    for converter in (smolexport_to_gguf, smolexport_to_mlx, smolexport_to_onnx):
        assert converter.check(spec) == []


BLOCK = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is walled off")
sys.meta_path.insert(0, Wall())
"""


def test_converting_needs_no_runtime(tmp_path: Path) -> None:
    """A fresh interpreter in which no heavy library can be imported exports to every format, and inspects."""
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    folder = tiny_checkpoint(tmp_path, **wide)
    code = BLOCK.format(blocked=HEAVY - {"onnx"}) + (
        "import smolexport, sys\n"
        "try:\n    import mlx\nexcept ImportError:\n    pass\nelse:\n    sys.exit('the wall has a hole')\n"
        "made = (('gguf', 'q8_0'), ('gguf', 'q4_k'), ('mlx', 'q4'), ('mlx', 'mxfp4'), ('onnx', 'int4'))\n"
        "for target, quant in made:\n"
        "    done = smolexport.export(target, sys.argv[1], f'{sys.argv[2]}{target}-{quant}', quant=quant)\n"
        "    print(smolexport.inspect(done.path).scheme)\n"
        "for done in smolexport.export_all(sys.argv[1], sys.argv[2] + 'all'):\n"
        "    print(smolexport.inspect(done.path).format, smolexport.fingerprint(done.path))\n"
    )
    *schemes, gguf, mark, mlx, same, onnx, again = python(code, str(folder), str(tmp_path / "x-")).split()
    assert schemes == ["q8_0", "q4_k_m", "q4", "mxfp4", "int4"]
    assert (gguf, mlx, onnx, mark, again) == ("gguf", "mlx", "onnx", same, same)


@pytest.mark.parametrize(
    "code",
    [
        "import smolexport",
        "from smolexport.cli.app import build; build()",
        "import sys; sys.argv[1:] = ['gguf', '--help']\n"
        "try:\n    from smolexport.cli import main; main()\nexcept SystemExit: pass",
    ],
)
def test_imports_stay_light(code: str) -> None:
    loaded = set(python(f"{code}\nimport sys; print('\\n', *sys.modules)").split())
    assert not loaded & (
        HEAVY
        | {"numba", "tokenizers", "huggingface_hub", "safetensors", "rich.progress", "matplotlib", "jinja2", "ray"}
    )


def test_an_export_loads_no_more_than_it_needs(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    code = (
        "import sys\nfrom importlib.metadata import packages_distributions\n"
        "from smolexport.cli import main\n"
        "try:\n    main(['gguf', sys.argv[1], '-q', 'q8_0', '-o', sys.argv[2]])\nexcept SystemExit:\n    pass\n"
        "print('\\n', *{m.split('.')[0] for m in sys.modules} & set(packages_distributions()))"
    )
    made, *loaded = python(code, str(folder), str(tmp_path / "x.gguf")).split()
    assert made.endswith("x.gguf")
    needed = {"click", "numpy", "numba", "llvmlite", "ml_dtypes", "safetensors", "tokenizers", "yaml"}
    parts = {name for name in loaded if name.startswith(("_", "cython", "smolexport"))}
    assert set(loaded) - parts <= needed


def test_nothing_tells_where_it_was_made() -> None:
    """No absolute path of a workplace, no ticket number and nothing left to do in any text of the repository."""
    pattern = re.compile(r"/wo[r]k/|/ro[o]t/|/ho[m]e/\w+/|\bissue #?\d+\b|\bTO[D]O\b|\bFIX[M]E\b|\bXX[X]\b")
    texts = [p for p in ROOT.rglob("*") if p.suffix in {".py", ".md", ".toml", ".txt", ".jsonl"}]
    texts += [ROOT / "Makefile", ROOT / ".ci" / "run"]
    foreign = ("build", "node_modules")
    parts = [(p, p.parts[len(ROOT.parts) :]) for p in texts]
    own = [p for p, names in parts if not any(name.startswith(".v") or name in foreign for name in names)]
    assert len(own) > 100
    for path in own:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_the_child_processes_of_tests_import_this_tree() -> None:
    assert str(ROOT / "converters") in SOURCES
    assert START[1] == "-c"
    assert python("import smolexport; print(smolexport.__file__)").strip() == str(ROOT / "smolexport" / "__init__.py")

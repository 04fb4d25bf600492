"""The layers of the package: a module imports from its own layer and from those before it, never from a later one."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "distaccum"

LAYERS = [
    *("errors", "config", "runtime", "testing", "planning", "loaders", "strategies", "accumulation", "checkpoints"),
    *("data", "models", "tasks", "observers", "training", "tools", "cli"),
]
"""Packages and modules, each of which imports only what stands before it."""

COMMANDS = ("train", "launch", "compare", "check", "tune", "study", "memory", "evaluate", "report")
SHARED_TOOLS = ("bench", "pages")


def _modules() -> dict[str, Path]:
    """By dotted name below the package; a package is named as its folder."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imported(source: str) -> set[str]:
    """Modules of the package that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "distaccum":
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                found.add(name if name in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.partition(".")[0] == "distaccum"}
    return found - {""}


def _problem(importer: str, imported: str) -> str | None:
    """What is wrong with an import; None if nothing is."""
    above, below = importer.split("."), imported.split(".")
    if below[0] in COMMANDS:
        return "imports a command"
    if above[0] in COMMANDS:
        return None
    if LAYERS.index(below[0]) > LAYERS.index(above[0]):
        return "imports what stands after it"
    if above[0] == below[0] == "tools" and len(above) > 1 and above[1] != below[1] and below[1] not in SHARED_TOOLS:
        return "is a tool that imports another tool"
    return None


def _circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Modules of one package that import each other, directly or by others of it."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in sorted(imports.get(name, ())):
                if other.partition(".")[0] == name.partition(".")[0]:
                    visit(other, [*way, name])
            done.add(name)

    for name in imports:
        visit(name, [])
    return found


def test_modules_import_what_stands_before_them() -> None:
    problems = {
        (name, other): said
        for name, path in MODULES.items()
        if name
        for other in _imported(path.read_text())
        if (said := _problem(name, other))
    }
    assert not problems


def test_no_two_modules_of_a_package_import_each_other() -> None:
    assert _circles({name: _imported(path.read_text()) for name, path in MODULES.items() if name}) == []


def test_no_module_imports_the_public_face() -> None:
    """`distaccum/__init__.py`, which imports what is above."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert "distaccum" not in [alias.name for alias in node.names], name
            elif isinstance(node, ast.ImportFrom) and node.module == "distaccum":
                assert {alias.name for alias in node.names} <= MODULES.keys(), name


def test_every_module_has_its_place() -> None:
    assert {name.partition(".")[0] for name in MODULES if name} == {*LAYERS, *COMMANDS}


def test_wrong_imports_are_noticed() -> None:
    assert _imported("def f():\n    from distaccum.training.trainer import Trainer\n") == {"training.trainer"}
    assert _imported("from distaccum import Accumulator, errors") == {"errors"}
    assert _imported("import distaccum.config.enums") == {"config.enums"}
    assert _problem("accumulation.accumulator", "training.trainer") == "imports what stands after it"
    assert _problem("training.trainer", "accumulation.accumulator") is None
    assert _problem("tools.tune.run", "tools.compare.run") == "is a tool that imports another tool"
    assert _problem("tools.tune.run", "tools.bench.rounds") is None
    assert _problem("tools.bench.rounds", "tools.tune.run") == "is a tool that imports another tool"
    assert _problem("training.run", "train") == "imports a command"
    assert _circles({"runtime.a": {"runtime.b"}, "runtime.b": {"runtime.c"}, "runtime.c": {"runtime.a"}})
    assert not _circles({"runtime.a": {"runtime.b", "runtime.c"}, "runtime.b": {"runtime.c"}})


FRAGMENTS = (
    *("And", "As", "At", "By", "For", "From", "How", "In", "Of", "On", "Only", "That", "Those", "To", "What", "When"),
    *("Where", "Whose", "Why", "With"),
)
"""First words of docstrings that are no whole thought: a docstring begins with a verb, or with what is returned."""


def _style_problems(source: str) -> list[str]:
    """Files of more than 400 lines, functions of more than 60, docstrings that begin as fragments."""
    found = ["the file is too long"] if source.count("\n") > 400 else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = getattr(node, "name", "the module")
            if (ast.get_docstring(node) or "").split(" ")[0] in FRAGMENTS:
                found.append(f"the docstring of {name} begins as a fragment")
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                found.append(f"{name} is too long")
    return found


def test_files_and_functions_are_short_and_docstrings_whole() -> None:
    problems = {name: found for name, path in MODULES.items() if (found := _style_problems(path.read_text()))}
    assert not problems


def test_long_files_and_fragments_are_noticed() -> None:
    assert _style_problems("x = 1\n" * 401) == ["the file is too long"]
    assert _style_problems("def f():\n" + "    x = 1\n" * 60) == ["f is too long"]
    assert _style_problems('def f():\n    """What it is."""\n') == ["the docstring of f begins as a fragment"]


def test_planning_knows_no_torch() -> None:
    code = "import sys, distaccum.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_own_loop_imports_nothing_of_the_trainer() -> None:
    code = (
        "import sys; from distaccum import Accumulator, WindowLoader; "
        "print(*{name.split('.')[1] for name in sys.modules if name.startswith('distaccum.')}, "
        "*{'hydra', 'omegaconf', 'wandb', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= set(LAYERS[: LAYERS.index("checkpoints")]), done.stdout


def test_an_own_loop_imports_little_beyond_torch() -> None:
    """`torch.distributed.tensor` alone, which brings sympy, would take longer than all else together."""
    code = (
        "import sys, torch; before = set(sys.modules); from distaccum import Accumulator; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = ("torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.fx")
    heavy += ("torch._dynamo", "torch._inductor", "sympy", "mpmath", "safetensors", "PIL", "sklearn")
    new = done.stdout.split()
    assert "distaccum.accumulation.accumulator" in new
    assert not [name for name in new if name.startswith(heavy)]


def test_a_run_imports_only_what_it_uses() -> None:
    """Trackers, and what datasets and models of other kinds need, are imported where they are used."""
    code = "import sys, torch, distaccum.training.run; print(torch.version.cuda or torch.version.hip, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    build, *names = done.stdout.split()
    unused = {"wandb", "mlflow", "tensorboard", "sklearn", "scipy", "pandas", "pyarrow", "matplotlib", "torchvision"}
    unused |= {"transformers", "datasets", "timm", "PIL", "peft", "fsspec", "bitsandbytes"}
    unused |= {"torch._dynamo", "torch._inductor"} if build == "None" else set()
    assert not unused & set(names)


def test_entry_points_are_short() -> None:
    for name in ("train", "compare", "check", "memory", "report", "study", "tune"):
        assert len((PACKAGE / f"{name}.py").read_text().splitlines()) < 100


def test_composing_the_configuration_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['train', '--cfg', 'job']; from distaccum.train import main\n"
        "try: main()\nfinally: sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "global_batch_size: 256" in done.stdout

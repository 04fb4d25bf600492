"""The floors of the house: a module imports from its own floor's neighbours below, never from above."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "distaccum"

FLOORS = {
    "config": 0,
    "choices": 0,
    "components": 0,
    "tool_configs": 0,
    "errors": 0,
    "redaction": 0,
    "distributed": 1,
    "gathering": 1,
    "heartbeat": 1,
    "launcher": 0,
    "diagnosis": 1,
    "compilation": 1,
    "data_workers": 1,
    "buffers": 1,
    "devices": 1,
    "files": 1,
    "remembered": 1,
    "seeding": 1,
    "interruption": 1,
    "logs": 1,
    "targets": 1,
    "live_memory": 1,
    "pages": 1,
    "planning": 2,
    "batch_sizes": 2,
    "grouping": 2,
    "links": 2,
    "recutting": 2,
    "data": 2,
    "models": 2,
    "tasks": 2,
    "optim": 2,
    "observers": 2,
    "fetching": 2,
    "noise_scale": 2,
    "micro_gradients": 3,
    "updates": 3,
    "strategies": 3,
    "checkpoints": 4,
    "stepping": 4,
    "loaders": 3,
    "accumulation": 4,
    "recovery": 4,
    "sums": 4,
    "model_options": 4,
    "memory_line": 4,
    "caching": 4,
    "run_folder": 5,
    "grace": 5,
    "totals": 5,
    "cut_tuning": 5,
    "fitting": 5,
    "sizing": 5,
    "trainer": 5,
    "updating": 5,
    "evaluation": 5,
    "averaging": 4,
    "continuing": 5,
    "evaluator": 5,
    "ensembling": 5,
    "parts": 5,
    "assembly": 5,
    "measuring": 5,
    "comparison": 5,
    "tuning": 5,
    "checking": 5,
    "footprint": 5,
    "reporting": 5,
    "batch_study": 5,
    "entry": 6,
    "train": 6,
    "compare": 6,
    "tune": 6,
    "check": 6,
    "memory": 6,
    "report": 6,
    "study": 6,
    "evaluate": 6,
}
# On one floor, these may be imported by their neighbours: each pair is (importer, imported).
NEIGHBOURS = {
    ("config", "choices"),
    ("components", "choices"),
    ("components", "config"),
    ("tool_configs", "choices"),
    ("tool_configs", "config"),
    ("components", "errors"),
    ("config", "errors"),
    ("launcher", "errors"),
    ("tool_configs", "errors"),
    ("distributed", "diagnosis"),
    ("distributed", "heartbeat"),
    ("distributed", "logs"),
    ("logs", "files"),
    ("heartbeat", "diagnosis"),
    ("interruption", "distributed"),
    ("grouping", "planning"),
    ("recutting", "planning"),
    ("remembered", "files"),
    ("sizing", "fitting"),
    ("assembly", "parts"),
    ("assembly", "sizing"),
    ("accumulation", "recovery"),
    ("accumulation", "sums"),
    ("recovery", "accumulation"),  # for its type only
    ("micro_gradients", "loaders"),
    ("micro_gradients", "strategies"),
    ("updates", "micro_gradients"),
    ("caching", "accumulation"),
    ("accumulation", "stepping"),
    ("trainer", "evaluator"),
    ("continuing", "totals"),
    ("trainer", "continuing"),
    ("assembly", "continuing"),
    ("evaluator", "evaluation"),
    ("evaluator", "grace"),
    ("averaging", "checkpoints"),
    ("memory_line", "averaging"),
    ("trainer", "grace"),
    ("trainer", "updating"),
    ("updating", "grace"),
    ("trainer", "totals"),
    ("trainer", "cut_tuning"),
    ("assembly", "run_folder"),
    ("comparison", "run_folder"),
    ("assembly", "trainer"),
    ("measuring", "parts"),
    ("measuring", "continuing"),
    ("comparison", "measuring"),
    ("tuning", "comparison"),
    ("tuning", "measuring"),
    ("tuning", "run_folder"),
    ("checking", "assembly"),
    ("checking", "parts"),
    ("batch_study", "run_folder"),
    ("batch_study", "assembly"),
    ("batch_study", "comparison"),
    ("batch_study", "measuring"),
    ("footprint", "parts"),
    ("train", "entry"),
    ("evaluate", "entry"),
    ("ensembling", "continuing"),
    ("ensembling", "evaluation"),
    ("ensembling", "evaluator"),
    ("ensembling", "parts"),
    ("ensembling", "run_folder"),
    ("compare", "entry"),
    ("tune", "entry"),
    ("check", "entry"),
    ("memory", "entry"),
    ("study", "entry"),
}


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imported_parts(source: str) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "distaccum":
            parts |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("distaccum."):
            parts.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            parts |= {a.name.split(".")[1] for a in node.names if a.name.startswith("distaccum.")}
    return parts


def _goes_up(importer: str, imported: str) -> bool:
    if importer == imported or (importer, imported) in NEIGHBOURS:
        return False
    return FLOORS[imported] >= FLOORS[importer]


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    upwards = [part for part in _imported_parts(path.read_text()) if _goes_up(_part(path), part)]
    assert not upwards, f"{path.name} imports {upwards} from its own floor or above"


def test_every_module_has_a_floor() -> None:
    assert {_part(path) for path in _modules()} == set(FLOORS)


def test_an_arrow_that_goes_up_is_noticed() -> None:
    assert _imported_parts("def f():\n    from distaccum.trainer import Trainer\n") == {"trainer"}
    assert _goes_up("accumulation", "trainer")
    assert not _goes_up("trainer", "accumulation")


def test_planning_knows_no_torch() -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse((PACKAGE / "planning.py").read_text()))
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
        )
    }
    assert "torch" not in imported


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

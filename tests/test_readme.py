"""What the README says is true: its code runs, its commands are the real ones, its reference is the schema's."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import config_reference
import pytest
import torch
from command_line import TINY, Ended
from launching import ROOT, torchrun
from safetensors.torch import load_file
from torch import nn

README = (ROOT / "README.md").read_text()
COMPONENTS = {"model", "task", "optim"}
BLOCKS = re.findall(r"<!-- run by tests/test_readme.py -->\n```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "own_loop.py"
    path.write_text(BLOCKS[0])
    return path


def _losses(output: str) -> list[str]:
    return re.findall(r"epoch \d: loss ([\d.]+)", output)


def test_the_own_loop_trains_alike_on_one_and_two_ranks(
    script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    runpy.run_path(str(script), run_name="__main__")
    alone = capsys.readouterr().out
    done = torchrun(2, str(script))
    assert done.returncode == 0, done.stderr
    assert len(_losses(alone)) == 5
    assert [float(loss) for loss in _losses(done.stdout)] == pytest.approx([float(x) for x in _losses(alone)], abs=2e-4)
    assert float(_losses(alone)[-1]) < 0.6 * float(_losses(alone)[0])
    assert "0 sync" in alone
    assert "1 sync" in done.stdout


def test_the_task_works() -> None:
    found: dict[str, type] = {}
    exec(BLOCKS[1], found)
    model = nn.Linear(2, 1)
    task = found["Regression"]()
    output = task(model, (torch.ones(3, 2), torch.zeros(3)))
    assert output.weight == 3
    assert output.loss_sum.requires_grad
    error = float(model(torch.ones(2)).detach().abs())
    assert task.metrics(output.sums, 3.0)["mean absolute error"] == pytest.approx(error)


def test_the_exported_model_loads(train: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(*TINY, "run_dir=run").status == 0
    found: dict[str, nn.Module] = {}
    exec(BLOCKS[2], found)
    stored = load_file("run/model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in found["model"].state_dict().items())


def test_the_own_loop_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    loop = tmp_path / "loop.py"
    # As often as told, whether or not the one before is on the disk yet.
    loop.write_text(
        BLOCKS[3].replace(
            "        if checkpointer.is_due", "        checkpointer.wait()\n        if checkpointer.is_due"
        )
    )
    killed = tmp_path / "killed.py"
    text = loop.read_text().replace(
        "        update = acc", "        if accumulator.updates == 23: os._exit(9)\n        update = acc"
    )
    killed.write_text("import os\n" + text)

    def run(script: Path, folder: str) -> tuple[int, list[str]]:
        (tmp_path / folder).mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path / folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout.splitlines()

    status, wanted = run(loop, "whole")
    assert (status, len(wanted)) == (0, 44)
    status, before = run(killed, "cut")
    assert (status, before) == (9, wanted[:23])
    status, after = run(loop, "cut")
    assert (status, after) == (0, wanted[20:])


def test_the_configuration_reference_is_the_schemas() -> None:
    assert config_reference.written(README) == README, "run: python tests/config_reference.py --write"


def test_every_field_of_the_schema_has_a_docstring() -> None:
    docs = config_reference.field_docstrings()
    for _, _, schema in config_reference.SECTIONS:
        for entry in dataclasses.fields(schema):
            described = any(entry.name in docs.get(parent.__name__, {}) for parent in schema.__mro__)
            is_section = str(entry.type).endswith("Config") or entry.name in COMPONENTS
            assert described or is_section or entry.name == "_target_", f"{schema.__name__}.{entry.name}"


def test_the_commands_are_the_real_ones() -> None:
    assert "pip install -e '.[examples]' && torchrun --nproc_per_node=4 -m distaccum.train" in README
    assert "pip install -e '.[test]' && pytest" in README
    assert "pip install -e '.[test]' && " in (ROOT / ".ci" / "run").read_text()


def test_pictures_and_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target

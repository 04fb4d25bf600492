"""The README's model, by its own commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Ended, updates
from documents import COMMANDS, block_run_by
from launching import ROOT

SHORT = ["train.max_updates=24", "wandb.mode=disabled", "run_dir=run"]


def test_it_trains(train: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_project.py").write_text(block_run_by("training/test_own_model.py"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (command,) = [
        command
        for command in COMMANDS
        if command.page == ROOT / "README.md" and command.name == "train" and "my_project.Net" in command.title
    ]
    ended = train(*command.arguments, *SHORT)
    assert ended.status == 0, ended.err
    losses = [line["loss"] for line in updates(Path("run"))]
    assert losses[-1] < 0.95 * losses[0]

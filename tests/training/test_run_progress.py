"""Where a run stands, as a checkpoint says it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from distaccum.checkpoints import Checkpoint
from distaccum.errors import UserError
from distaccum.training.progress import Totals, check_progress

PROGRESS: dict[str, Any] = {
    "totals": asdict(Totals(updates=7)),
    "total_seconds": 1.5,
    "epoch": 1,
    "next_window": 3,
    "position": 24,
    "owes_evaluation": False,
    "evaluation": {"update": 6, "epoch": 1, "metrics": {"loss": 0.5}, "references": {}, "seconds": 0.1},
    "windows": {"batch.global_batch_size": 8, "batch.drop_last": False, "seed": -1, "training samples": 64},
    "config": {},
}


def checkpoint(progress: dict[str, Any]) -> Checkpoint:
    return Checkpoint(path=Path("update-7"), manifest={"update": 7, "state": {"progress": progress}})


def test_what_a_trainer_says_is_taken() -> None:
    check_progress(checkpoint(PROGRESS), "Go on.")
    check_progress(
        checkpoint({**PROGRESS, "evaluation": None, "windows": {**PROGRESS["windows"], "more": 1}}), "Go on."
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epoch", -1),
        ("next_window", 1.5),
        ("position", -1),
        ("totals", {"updates": "7"}),
        ("totals", {"updates": 8}),
        ("totals", {"updates": 7, "more": 1}),
        ("owes_evaluation", "yes"),
        ("evaluation", {"update": 6}),
        ("windows", {}),
        ("config", None),
        ("total_seconds", None),
    ],
)
def test_what_no_trainer_says_is_refused(key: str, value: Any) -> None:
    with pytest.raises(
        UserError, match=rf"^update-7 was not saved by distaccum\.train, .* {key}.* another form\. Mend\."
    ):
        check_progress(checkpoint({**PROGRESS, key: value}), "Mend.")

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import updates
from launching import assert_passed, cases, forked
from test_resume_on_ranks import UNEQUAL

GROUPS = [
    *(entry for entry in UNEQUAL if not entry.startswith("schedule")),
    "schedule=step",
    "schedule.every_updates=4",
    "schedule.warmup_updates=2",
    "train.eval_every=100",
    "optim.groups=[{match: [blocks.0.*], name: first, lr: 0.02, weight_decay: 0.3}]",
    "optim.no_weight_decay=[bias,norm,embedding]",
]
NAMES = ["default", "no_weight_decay", "first", "first-no_weight_decay"]


@cases("checks_groups", world_sizes=(2, 4))
def test_groups(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)


def test_groups_go_on_under_another_placement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(ranks: int, run_dir: str, *overrides: str) -> str:
        done = forked(ranks, "-m", "distaccum.train", *GROUPS, f"run_dir={run_dir}", *overrides, launched=ranks > 1)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = run(1, "undisturbed", "train.max_updates=9")
    assert "4 parameter groups: default (" in said
    for number, (ranks, *overrides) in enumerate(
        [(1,), (2, "strategy=fsdp"), (2, "strategy=ddp", "strategy.shard_optimizer=true")], 1
    ):
        run(ranks, "moving", f"train.max_updates={3 * number}", *overrides)
    one, other = updates(Path("undisturbed")), updates(Path("moving"))
    keys = ["loss", "grad_norm", "lr", *(f"{kind}/{name}" for kind in ("lr", "grad_norm") for name in NAMES)]
    for key in keys:
        assert [line[key] for line in other] == pytest.approx([line[key] for line in one], rel=1e-10), key
    assert one[0]["lr/first"] / one[0]["lr/default"] == one[8]["lr/first"] / one[8]["lr/default"] == pytest.approx(10)

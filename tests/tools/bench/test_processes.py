from __future__ import annotations

import os
import pickle
import signal
from functools import partial
from pathlib import Path

import pytest

from distaccum.config.compose import compose
from distaccum.errors import UserError
from distaccum.tools.bench.processes import KILLED, Ranks


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=text"],
        ["precision=fp16", "optim=rmsprop", "schedule=step", "train.on_nonfinite=skip"],
        ["model=custom", "model._target_=user_project.Line", "+model.inner={_target_: a.B, sizes: [1, 2]}"],
    ],
)
def test_a_configuration_survives_the_way_to_another_process(overrides: list[str]) -> None:
    config = compose(overrides, "compare")
    assert pickle.loads(pickle.dumps(config)) == config


def refuse() -> int:
    print("SomeError: of somebody else", flush=True)
    raise UserError("this can't be run here")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (partial(int, 0), None),
        (refuse, "this can't be run here"),
        (partial(os.kill, 0, signal.SIGKILL), KILLED),
    ],
)
def test_the_end_of_a_process_and_its_reason(tmp_path: Path, run: partial[int], said: str | None) -> None:
    log = tmp_path / "logs" / "log"
    log.parent.mkdir()
    log.write_text("error: of an earlier start\n")
    ranks = Ranks(run, num_processes=1, threads=1, log=log)
    assert ranks.has_ended(60)
    assert ranks.failure() == said
    ranks.stop(1)

"""Learning rates as functions of the update's number."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, Ended, metrics, updates, without_measurements
from torch import nn
from torch.optim import lr_scheduler

from distaccum.checkpoints.folder import checkpoints_in
from distaccum.config import (
    DecayScheduleConfig,
    PolynomialScheduleConfig,
    ScheduleConfig,
    StepScheduleConfig,
    WSDScheduleConfig,
)
from distaccum.config.compose import compose
from distaccum.config.enums import DecayShape
from distaccum.errors import UserError
from distaccum.training.schedules import schedule_factor


def _factors(section: Any, total: int) -> list[float]:
    factor = schedule_factor(section, total)
    return [factor(update) for update in range(1, total + 1)]


def test_schedules_by_hand() -> None:
    assert _factors(ScheduleConfig(), 3) == [1, 1, 1]
    assert _factors(ScheduleConfig(warmup_updates=4), 6) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert _factors(ScheduleConfig(warmup_ratio=0.4), 10) == [0.25, 0.5, 0.75, *[1] * 7]
    assert _factors(DecayScheduleConfig(name="linear", final_factor=0.2), 5) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    cosine = DecayScheduleConfig(name="cosine")
    assert _factors(cosine, 5) == pytest.approx([1, 0.904508, 0.654508, 0.345492, 0.095492], abs=1e-6)
    cosine.final_factor = 0.5
    assert _factors(cosine, 5) == pytest.approx([1, 0.926777, 0.75, 0.573223, 0.5], abs=1e-6)
    assert _factors(DecayScheduleConfig(name="linear", warmup_updates=2), 4) == pytest.approx([0.5, 1, 2 / 3, 1 / 3])
    for as_long in (ScheduleConfig(warmup_updates=2), DecayScheduleConfig(name="cosine", warmup_updates=2)):
        assert _factors(as_long, 2) == [0.5, 1]
    assert _factors(PolynomialScheduleConfig(power=2), 4) == pytest.approx([1, 0.5625, 0.25, 0.0625])
    assert _factors(PolynomialScheduleConfig(power=2, final_factor=0.5), 3) == pytest.approx([1, 0.625, 0.5])
    step = StepScheduleConfig(every_updates=2, factor=0.1)
    assert _factors(step, 5) == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    warm_step = StepScheduleConfig(every_updates=2, factor=0.1, warmup_updates=2)
    assert _factors(warm_step, 5) == pytest.approx([0.5, 1, 1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("shape", "falling"),
    [
        (DecayShape.linear, [0.75, 0.5, 0.25]),
        (DecayShape.cosine, [0.853553, 0.5, 0.146447]),
        (DecayShape.one_minus_sqrt, [0.5, 0.292893, 0.133975]),
    ],
)
def test_wsd_by_hand(shape: DecayShape, falling: list[float]) -> None:
    wsd = WSDScheduleConfig(decay_ratio=0.3, warmup_ratio=0.2, shape=shape)
    assert _factors(wsd, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, *falling], abs=1e-6)
    wsd.final_factor = 0.1
    assert _factors(wsd, 10)[:7] == [0.5, *[1] * 6]
    assert _factors(wsd, 10)[-1] == pytest.approx(0.1)
    assert sorted(_factors(wsd, 10)[-4:], reverse=True) == _factors(wsd, 10)[-4:]
    whole = WSDScheduleConfig(decay_ratio=1, shape=DecayShape.cosine)
    assert _factors(whole, 9) == _factors(DecayScheduleConfig(name="cosine"), 9)


@pytest.mark.parametrize(
    ("section", "reference"),
    [
        (DecayScheduleConfig(name="cosine"), lambda optim, total: lr_scheduler.CosineAnnealingLR(optim, total)),
        (DecayScheduleConfig(name="linear"), lambda optim, total: lr_scheduler.LinearLR(optim, 1, 0, total)),
        (PolynomialScheduleConfig(), lambda optim, total: lr_scheduler.PolynomialLR(optim, total, 0.9)),
    ],
)
def test_a_decay_to_0_is_that_of_torch_with_as_many_steps(section: Any, reference: Any) -> None:
    """torch counts from 0, and its 0 is the value after as many steps: that of the update after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = reference(optimizer, 23)
    wanted = []
    for _ in range(23):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert _factors(section, 23) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_each_update_has_a_rate(total: int) -> None:
    decays = [DecayScheduleConfig(name="linear"), DecayScheduleConfig(name="cosine"), PolynomialScheduleConfig()]
    decays += [WSDScheduleConfig(shape=shape) for shape in DecayShape]
    for section in (ScheduleConfig(), StepScheduleConfig(every_updates=total), *decays):
        assert _factors(section, total)[0] == 1
        assert min(_factors(section, total)) > 0
    for section in decays:
        section.final_factor = 0.125
        assert total == 1 or _factors(section, total)[-1] == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (ScheduleConfig(warmup_updates=11), r"warmup_updates=11 is longer than the run, which has 10 updates"),
        (WSDScheduleConfig(warmup_updates=8, decay_ratio=0.3), r"decay_ratio=0.3 makes 3 of 10 .* warm-up has 8"),
    ],
)
def test_schedules_longer_than_the_run_are_refused(section: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        schedule_factor(section, 10)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["schedule.warmup_ratio=1.5"], r"warmup_ratio=1.5 is impossible: it must be at least 0 and at most 1"),
        (["schedule.warmup_updates=3", "schedule.warmup_ratio=0.1"], "both say how long the warm-up is"),
        (["schedule=wsd", "schedule.decay_ratio=0"], r"decay_ratio=0.0 is impossible: it must be above 0"),
        (["schedule=wsd", "schedule.shape=square"], r"schedule\.shape"),
        (["schedule=polynomial", "schedule.power=0"], r"power=0.0 is impossible: it must be greater than 0"),
        (["schedule=wsd", "optim=schedule_free"], "schedule=wsd would make that average one of its early weights"),
        (["schedule=constant", "schedule.warmup_ratio=0.1", "optim=rprop"], r"Set schedule=constant .*ratio=null"),
        (["schedule=custom"], r"schedule\._target_ must be given"),
    ],
)
def test_impossible_settings_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose(overrides)


@pytest.mark.parametrize(
    "schedule",
    [
        ["schedule=wsd"],
        ["schedule=constant", "schedule.warmup_ratio=0.1"],
        ["schedule=custom", "schedule._target_=user_project.with_one"],
    ],
)
def test_what_needs_the_length_of_a_run_is_refused_where_it_is_unknown(schedule: list[str]) -> None:
    noise = ["batch.schedule=noise", "batch.min_size=16", "batch.max_size=512", "insight.noise_scale=true"]
    with pytest.raises(UserError, match=r"can't be known how many .* set train\.max_updates"):
        compose([*noise, *schedule])
    compose([*noise, *schedule, "train.max_updates=9"])
    compose([*noise, "schedule=constant", "schedule.warmup_updates=3"])


def _own(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": f"user_project.{name}", **options}


def test_an_own_schedule_is_a_function_of_the_update() -> None:
    assert _factors(_own("halving", times=2), 4) == [1, 1, 0.5, 0.5]
    assert _factors(_own("with_one", value=0, at=2), 3) == [1, 0, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5, "much", None])
def test_own_factors_are_checked(value: Any) -> None:
    for at in (1, 9999):  # before anything is trained
        with pytest.raises(UserError, match=rf"with_one gives .* for update {at} of 9999.* finite and at least 0"):
            schedule_factor(_own("with_one", value=value, at=at), 9999)
    factor = schedule_factor(_own("with_one", value=value, at=5000), 9999)
    assert factor(4999) == factor(5001) == 1
    with pytest.raises(UserError, match="for update 5000"):
        factor(5000)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"_target_": "builtins.str"}, r"builtins\.str must return a function .* returned a str"),
        (_own("halving"), r"schedule: halving cannot be called so: missing a required argument: 'times'"),
        (_own("counting"), r"counting gives 1\.0 for update 1, and 0\.\d+ when asked again"),
        (_own("missing"), r"schedule\._target_=user_project\.missing cannot be imported"),
    ],
)
def test_what_is_no_schedule_is_refused(section: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        schedule_factor(section, 10)


def test_a_run_with_wsd_goes_on_bit_for_bit(train: Callable[..., Ended]) -> None:
    more = [*TINY, "train.max_updates=6", "checkpoint.every_updates=1", "checkpoint.keep_last=9", "schedule=wsd"]
    more += ["checkpoint.async_save=false", "schedule.decay_ratio=0.5", "schedule.warmup_ratio=0.35", "optim.lr=1.0"]
    ended = train(*more, "run_dir=whole")
    assert ended.status == 0, ended
    assert "a warm-up of 2 of 6 updates" in ended.out
    assert "a decay in the last 3 of 6 updates" in ended.out
    assert [line["lr"] for line in updates(Path("whole"))] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    for update in (3, 5):  # before the decay, and in it
        cut = Path(f"cut{update}")
        shutil.copytree("whole", cut)
        for folder in checkpoints_in(cut / "checkpoints"):
            if folder.name > f"update-{update:08d}":
                shutil.rmtree(folder)
        assert f"going on from {cut}/checkpoints/update-{update:08d}" in train(*more, f"run_dir={cut}").out
        found, wanted = ([without_measurements(line) for line in metrics(run)] for run in (cut, Path("whole")))
        assert found == wanted
        weights = (cut / "model.safetensors").read_bytes()
        assert weights == Path("whole/model.safetensors").read_bytes()
    # Negative control: another decay from the same checkpoint is another run.
    start = ["resume=whole/checkpoints/update-00000003", "run_dir=other", "schedule.shape=cosine"]
    assert train(*more, *start).status == 0
    assert Path("other/model.safetensors").read_bytes() != weights


def test_a_run_with_an_own_schedule(train: Callable[..., Ended]) -> None:
    own = [*TINY, "schedule=custom", "schedule._target_=user_project.halving", "optim.lr=1.0", "train.max_updates=4"]
    assert train(*own, "+schedule.times=2", "run_dir=run").status == 0
    assert [line["lr"] for line in updates(Path("run"))] == [1, 1, 0.5, 0.5]
    assert "halving cannot be called so" in train(*own, "+schedule.time=2", "run_dir=wrong").message

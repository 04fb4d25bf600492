from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distaccum.config.enums import Implementation
from distaccum.config.optimizers import AdagradConfig, AdamConfig, LionConfig, RMSpropConfig, SGDConfig
from distaccum.errors import UserError
from distaccum.training.optim import Schedule, build_optimizer

CPU = torch.device("cpu")


def _parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, dtype=torch.float64))]


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (SGDConfig(lr=0.1, momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True)),
        (AdamConfig(lr=0.1, amsgrad=True), lambda p: torch.optim.Adam(p, 0.1, amsgrad=True)),
        (
            AdamConfig(_target_="torch.optim.AdamW", lr=0.1, weight_decay=0.1, betas=[0.8, 0.9]),
            lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.9), weight_decay=0.1),
        ),
        (RMSpropConfig(lr=0.1, alpha=0.5), lambda p: torch.optim.RMSprop(p, 0.1, 0.5)),
        (AdagradConfig(lr=0.1), lambda p: torch.optim.Adagrad(p, 0.1)),
    ],
)
@pytest.mark.parametrize("implementation", [Implementation.auto, Implementation.foreach, Implementation.forloop])
def test_optimizers_do_what_torch_does(config: Any, reference: Any, implementation: Implementation) -> None:
    config.implementation = implementation
    mine, theirs = _parameters(), _parameters()
    optimizers = [build_optimizer(config, mine, CPU), reference(theirs)]
    for _ in range(3):
        for parameters, optimizer in zip((mine, theirs), optimizers, strict=True):
            parameters[0].grad = parameters[0].detach() * torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
            optimizer.step()
    assert torch.allclose(mine[0], theirs[0], rtol=1e-12, atol=0)
    assert not torch.equal(mine[0], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [{"betas": (0.9, 1.0)}, {"lr": -1.0}, {"weight_decay": -0.1}])
def test_lion_refuses_what_has_no_meaning(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"Lion refuses its arguments: .*must be at least 0"):
        build_optimizer(LionConfig(**wrong), _parameters(), CPU)
    with pytest.raises(UserError, match="complex numbers have no sign"):
        build_optimizer(LionConfig(), [nn.Parameter(torch.ones(2, dtype=torch.complex64))], CPU)


def test_fused_is_taken_where_torch_has_it() -> None:
    assert build_optimizer(AdamConfig(), _parameters(), CPU).defaults["fused"]
    assert build_optimizer(RMSpropConfig(), _parameters(), CPU).defaults["foreach"]
    forloop = build_optimizer(AdamConfig(implementation=Implementation.forloop), _parameters(), CPU)
    assert not forloop.defaults["fused"]
    assert forloop.defaults["foreach"] is False
    with pytest.raises(UserError, match=r"no fused torch.optim.RMSprop on cpu"):
        build_optimizer(RMSpropConfig(implementation=Implementation.fused), _parameters(), CPU)


def test_anybodys_own_optimizer() -> None:
    section = {"_target_": "torch.optim.NAdam", "lr": 0.5, "momentum_decay": 0.1}
    optimizer = build_optimizer(section, _parameters(), CPU)
    assert isinstance(optimizer, torch.optim.NAdam)
    assert optimizer.defaults["momentum_decay"] == 0.1
    with pytest.raises(UserError, match="optim built a list"):
        build_optimizer({"_target_": "builtins.list"}, _parameters(), CPU)


def test_what_cannot_be_optimized_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer(AdamConfig(), [nn.Parameter(torch.ones(1), requires_grad=False)], CPU)
    with pytest.raises(UserError, match=r"refuses its arguments: Invalid learning rate: -1.0"):
        build_optimizer(AdamConfig(lr=-1.0), _parameters(), CPU)


def test_a_schedule_sets_every_group() -> None:
    groups = [{"params": _parameters(), "lr": 1.0}, {"params": _parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    schedule = Schedule(optimizer, lambda update: 1 / update)
    assert schedule.apply(4) == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.025]
    # A function of the number alone: asked again, or out of order, it says the same.
    assert (schedule.apply(2), schedule.apply(4)) == (0.5, 0.25)

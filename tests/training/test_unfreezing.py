"""`model.unfreeze` in one process; tests/distributed/test_unfreezing_on_ranks.py has the updates on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distaccum import Accumulator, TaskOutput
from distaccum.errors import UserError
from distaccum.strategies import SingleStrategy
from distaccum.training.model import build_model
from distaccum.training.unfreezing import Unfreezing, require_within_run, unfreeze_updates

GPT = {"_target_": "distaccum.models.GPT", "vocab_size": 5, "max_length": 4}


def trained(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()


def test_a_parameter_is_trained_from_the_first_update_that_it_is_listed_at() -> None:
    module = layers()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    updates = unfreeze_updates({"7": ["2.*", "0.bias"], 4: ["2.weight"], 9: ["2.*"]})
    assert list(updates) == [4, 7, 9]
    unfreezing = Unfreezing(SingleStrategy(module), optimizer, updates)
    assert trained(module) == ["0.weight", "4.weight", "4.bias"]
    assert [update for update in range(12) if unfreezing.is_due(update)] == [4, 7]  # at 9 all is trained already
    unfreezing.go_to(4)
    assert trained(module) == ["0.weight", "2.weight", "4.weight", "4.bias"]
    unfreezing.go_to(100)
    assert len(trained(module)) == 6
    unfreezing.go_to(6)  # as a run that goes on from an earlier checkpoint
    assert trained(module) == ["0.weight", "2.weight", "4.weight", "4.bias"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_nothing_touches_what_is_frozen_until_then(momentum: float, fused: bool) -> None:
    module = layers()
    settings: dict[str, Any] = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.5, "fused": fused}
    optimizer = torch.optim.SGD(module.parameters(), **settings)
    accumulator = Accumulator(module, optimizer)
    unfreezing = Unfreezing(accumulator.strategy, optimizer, {3: ["0.*"]})
    plain = layers()
    plain_optimizer = torch.optim.SGD(plain.parameters(), **{**settings, "fused": False})
    before = module[0].weight.detach().clone()
    for update in range(1, 6):
        unfreezing.go_to(update)
        plain[0].requires_grad_(update >= 3)
        inputs = torch.randn(8, 3, dtype=torch.float64)
        accumulator.run(inputs.split(3), lambda part: TaskOutput(module(part).square().sum(), len(part)))
        plain_optimizer.zero_grad()
        plain(inputs).square().mean().backward()
        plain_optimizer.step()
        assert torch.equal(module[0].weight, before) == (update < 3)
        assert (module[0].weight in optimizer.state) == (update >= 3 and momentum > 0)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


def test_a_model_that_is_built_can_be_trained_as_a_whole() -> None:
    """So optimizer, averages and what measures memory hold all of it."""
    module = build_model({**GPT, "unfreeze": {2: ["blocks.*"]}, "freeze": ["token_embedding.*"]}, None)
    assert {name for name, _ in module.named_parameters()} - set(trained(module)) == {"token_embedding.weight"}
    module = build_model({"_target_": f"{__name__}.frozen_backbone", "unfreeze": {2: ["0.*"]}}, None)
    assert len(trained(module)) == 6


def frozen_backbone() -> nn.Module:
    module = layers()
    module[0].requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unfreeze": {3: ["block.*"]}}, r"unfreeze: no parameter has a name like block\.\*\. Near it are .*blocks"),
        ({"unfreeze": {3: ["*"], 5: ["norm.*"]}}, "unfreeze lists all that is trained, .* before update 3"),
        ({"unfreeze": {2: ["norm.*"]}, "freeze": ["*.bias"]}, "freeze and model.unfreeze both list norm.bias"),
        ({"unfreeze": {0: ["norm.*"]}}, "unfreeze has update 0, and a run's first update is 1"),
        ({"unfreeze": {-3: ["norm.*"]}}, "unfreeze has update -3"),
        ({"unfreeze": {"soon": ["norm.*"]}}, "unfreeze has 'soon'.* it must be lists of patterns by update"),
        ({"unfreeze": {1.5: ["norm.*"]}}, "unfreeze has 1.5: .* it must be"),
        ({"unfreeze": {3: "norm.*"}}, r"unfreeze has 3: 'norm\.\*'; it must be"),
        ({"unfreeze": ["norm.*"]}, "it must be lists of patterns by update"),
        ({"unfreeze": {3: []}}, r"unfreeze has 3: \[\]; it must be"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"model.*{message}"):
        build_model({**GPT, **options}, None)


def test_an_update_after_the_last_one_is_refused() -> None:
    require_within_run({3: ["a"], 8: ["b"]}, last=8)
    with pytest.raises(UserError, match=r"model\.unfreeze has update 8, and the run's last update is 7"):
        require_within_run({3: ["a"], 8: ["b"]}, last=7)

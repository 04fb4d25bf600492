"""`optim=muon`: which parameters are Muon's, and both parts as one optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distaccum.config.optimizers import MuonConfig
from distaccum.errors import UserError
from distaccum.models import GPT, MLP
from distaccum.training.muon import Muon, hidden_matrices
from distaccum.training.optim import Schedule, build_optimizer

CPU = torch.device("cpu")


class Tied(nn.Module):
    """With a head that has the embedding's weight, layers of torch's own, and a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(5, 8))
        self.embedding = nn.Embedding(7, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight


def _names(module: nn.Module) -> set[str]:
    hidden = hidden_matrices(module)
    return {name for name, parameter in module.named_parameters() if id(parameter) in hidden}


def test_hidden_matrices_are_neither_embedding_nor_head() -> None:
    assert _names(MLP(input_shape=(4,), num_classes=2, hidden_sizes=[8, 8])) == {"layers.1.weight", "layers.4.weight"}
    of_a_layer = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert _names(Tied()) == {f"layers.{number}.{name}" for number in (0, 1) for name in of_a_layer}
    # Its head is the embedding itself, so the last linear layer, in a block, is hidden.
    gpt = GPT(vocab_size=5, max_length=4, num_layers=1, num_heads=1, width=8)
    linear = {f"{name}.weight" for name, part in gpt.named_modules() if isinstance(part, nn.Linear)}
    assert _names(gpt) == linear
    assert len(linear) == 4
    assert _names(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 3))) == set()
    frozen = MLP(input_shape=(4,), num_classes=2, hidden_sizes=[8, 8])
    frozen.layers[1].weight.requires_grad_(False)
    assert _names(frozen) == {"layers.4.weight"}


def _module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> Tensor:
    optimizer.zero_grad()
    module(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def test_both_parts_keep_their_ratio_and_their_state() -> None:
    optimizer = build_optimizer(MuonConfig(lr=0.1, adamw_lr_ratio=0.25), _module(), CPU)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("muon", 0.1), ("adamw", 0.025)]
    Schedule(optimizer, lambda update: 1 / update).apply(4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.00625]
    runs = []
    for is_loaded in (False, True):
        module = _module()
        optimizer = build_optimizer(MuonConfig(lr=0.1), module, CPU)
        _step(module, optimizer)
        if is_loaded:
            state = optimizer.state_dict()
            optimizer = build_optimizer(MuonConfig(lr=0.1), module, CPU)
            optimizer.load_state_dict(state)
        runs.append(_step(module, optimizer, seed=1))
    assert torch.equal(*runs)
    keys = {key for state in optimizer.state.values() for key in state}
    assert keys == {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}


def test_it_takes_groups() -> None:
    """A group's options apply to whichever part its parameters are in."""
    groups: list[Any] = [{"match": ["0.*"], "lr": 0.2, "name": "first"}]
    config = MuonConfig(lr=0.1, adamw_lr_ratio=0.5, groups=groups, no_weight_decay=["bias", "norm"])
    optimizer = build_optimizer(config, _module(), CPU)
    found = {group["name"]: (group["lr"], group["weight_decay"], group["part"]) for group in optimizer.param_groups}
    assert found == {
        "default-muon": (0.1, 0.1, "muon"),
        "default-adamw": (0.05, 0.1, "adamw"),
        "no_weight_decay-adamw": (0.05, 0.0, "adamw"),
        "first-muon": (0.2, 0.1, "muon"),
        "first-no_weight_decay-adamw": (0.1, 0.0, "adamw"),
    }
    matched = build_optimizer(MuonConfig(adamw_match=["2.*"]), _module(), CPU).param_groups[0]
    assert [list(parameter.shape) for parameter in matched["params"]] == [[8, 4]]


def test_what_has_no_hidden_matrix_is_refused() -> None:
    with pytest.raises(UserError, match="the model has no hidden matrix"):
        build_optimizer(MuonConfig(), nn.Linear(3, 2), CPU)
    with pytest.raises(UserError, match="adamw_match: no parameter has a name like"):
        build_optimizer(MuonConfig(adamw_match=["nothing"]), _module(), CPU)
    with pytest.raises(UserError, match="adjust_lr_fn=other is impossible: it must be match_rms_adamw or original"):
        MuonConfig(adjust_lr_fn="other")
    with pytest.raises(ValueError, match=r"Muon takes matrices alone, and one parameter has shape \[3\]"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="part='sgd' must be muon or adamw"):
        Muon([{"params": [nn.Parameter(torch.zeros(3, 3))], "part": "sgd"}])

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, Ended
from torch import nn

from distaccum.config.enums import LrRule
from distaccum.config.optimizers import AdadeltaConfig, AdamConfig, SGDConfig
from distaccum.errors import UserError
from distaccum.models import GPT
from distaccum.training.optim import Schedule, build_optimizer
from distaccum.training.parameter_groups import parameter_kinds

CPU = torch.device("cpu")


def _gpt() -> GPT:
    return GPT(num_layers=2, num_heads=2, width=8, vocab_size=16, max_length=16)


def _names(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {group["name"]: [names[id(entry)] for entry in group["params"]] for group in optimizer.param_groups}


def test_the_first_match_wins_and_frozen_parameters_are_left_out() -> None:
    module = _gpt()
    module.position_embedding.weight.requires_grad_(False)
    groups = [
        {"match": ["position_*"], "lr": 1.0},  # frozen, and no failure
        {"match": ["blocks.0.*", "norm.bias"], "name": "early", "lr": 0.5, "betas": [0.5, 0.6]},
        {"match": "*.bias", "weight_decay": 0.25},
    ]
    optimizer = build_optimizer(AdamConfig(lr=0.1, groups=groups), module, CPU)
    found = _names(optimizer, module)
    assert list(found) == ["default", "early", "*.bias"]
    assert "norm.bias" in found["early"]
    assert all(name.startswith("blocks.1") and name.endswith("bias") for name in found["*.bias"])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 0.1]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999), (0.5, 0.6), (0.9, 0.999)]
    assert sum(map(len, found.values())) == sum(p.requires_grad for p in module.parameters())


def test_kinds_are_found_by_modules_and_dimensions() -> None:
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 3))

    module = nn.ModuleDict(
        {
            "batch": nn.BatchNorm1d(3),
            "layer": nn.LayerNorm([2, 3]),
            "rms": nn.RMSNorm(3),
            "llama": LlamaRMSNorm(),
            "attention": nn.MultiheadAttention(4, 2),
            "embedding": nn.Embedding(3, 4),
            "normal": nn.Linear(3, 4),
        }
    )
    module["tied"] = nn.Linear(4, 3)
    module["tied"].weight = module["embedding"].weight
    kinds = parameter_kinds(module)
    by_kind = {
        kind: {name for name, parameter in module.named_parameters() if kind in kinds[id(parameter)]}
        for kind in ("bias", "norm", "embedding")
    }
    norms = {f"{layer}.{name}" for layer in ("batch", "layer") for name in ("weight", "bias")}
    assert by_kind["norm"] == {*norms, "rms.weight", "llama.weight"}
    assert {"attention.in_proj_bias", "normal.bias", "batch.bias"} < by_kind["bias"]
    assert not any("weight" in name for name in by_kind["bias"])
    assert by_kind["embedding"] == {"embedding.weight"}


def test_rates_fall_from_layer_to_layer() -> None:
    module = _gpt()
    optimizer = build_optimizer(AdamConfig(lr=0.8, layer_decay=0.5), module, CPU)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"head": 0.8, "block1": 0.4, "block0": 0.2, "embedding": 0.1}
    assert _names(optimizer, module)["embedding"] == ["token_embedding.weight", "position_embedding.weight"]
    # Stages of several alike blocks, as in a ResNet.
    stages = nn.Sequential(
        nn.Conv2d(1, 2, 1), *(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)) for _ in range(2)), nn.Linear(2, 2)
    )
    optimizer = build_optimizer(SGDConfig(lr=1.0, layer_decay=0.5), stages, CPU)
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [
        ("head", 1.0),
        *((f"block{number}", 0.5 ** (4 - number)) for number in (3, 2, 1, 0)),
        ("embedding", 0.5**5),
    ]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            AdamConfig(groups=[{"match": ["norm.weigth"], "lr": 1.0}]),
            r"groups\[0\]: no parameter .*Near it are norm.weig",
        ),
        (
            AdamConfig(groups=[{"match": ["blok.1.*"]}]),
            r"like blok\.1\.\*\. Near it are blocks\.1\..*, blocks\.1\..*, blocks\.1",
        ),
        (AdamConfig(groups=[{"match": ["*.attenton.*"]}]), r"Near it are blocks\.0\.attention"),
        (AdamConfig(groups=[{"match": ["xyz.*"]}]), r"There are token_embedding.weight, .*, …, none near it"),
        (AdamConfig(groups=[{"match": ["*"]}, {"match": ["norm.*"]}]), r"groups\[1\]: all 2 parameters .*first match"),
        (AdamConfig(groups=[{"match": ["norm.*"], "learning_rate": 1}]), r"Adam has no option learning_rate .*amsgrad"),
        (AdamConfig(groups=[{"match": ["norm.*"], "fused": True}]), "no option fused for a group"),
        (AdamConfig(groups=[{"match": ["norm.*"], "lr": -1.0}]), r"groups\[0\]: Adam refuses lr=-1.0: Invalid learn"),
        (AdamConfig(groups=[{"match": ["norm.*"], "lr": "high"}]), r"groups\[0\]: lr=high is impossible"),
        (AdamConfig(groups=[{"match": ["norm.*"], "betas": [0.9]}]), r"groups\[0\]: Adam refuses betas=\(0.9,\)"),
        (AdamConfig(groups=[{"lr": 1.0}]), r"groups\[0\]=.* must be patterns"),
        (AdamConfig(groups=[{"match": ["norm.*"], "params": []}]), "leave params out"),
        (AdamConfig(groups=[{"match": ["norm.*"], "name": "default"}]), "two groups .* have the name default"),
        (AdamConfig(no_weight_decay=["biases"]), "takes bias, norm, embedding, and not biases"),
        (AdamConfig(layer_decay=1.5), "layer_decay=1.5 is impossible"),
        ({"_target_": "torch.optim.Rprop", "lr": 0.1, "no_weight_decay": ["bias"]}, "Rprop has no weight decay"),
    ],
)
def test_what_is_wrong_is_said(config: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_optimizer(config, _gpt(), CPU)


def test_what_needs_names_or_layers_says_so() -> None:
    with pytest.raises(UserError, match="needs a model of several blocks, and Linear is one"):
        build_optimizer(AdamConfig(layer_decay=0.5), nn.Linear(2, 2), CPU)
    with pytest.raises(UserError, match="need the model, whose parameters have names"):
        build_optimizer(AdamConfig(no_weight_decay=["bias"]), nn.Linear(2, 2).parameters(), CPU)


def test_weight_decay_follows_the_size_of_windows() -> None:
    module = _gpt()
    config = AdamConfig(lr=0.1, weight_decay=0.4, no_weight_decay=["norm"])
    optimizer = build_optimizer(config, module, CPU)
    schedule = Schedule(optimizer, lambda update: 1.0, LrRule.none, LrRule.linear)
    schedule.apply(1, 0.5)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.2), (0.1, 0.0)]
    schedule.after_update()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.4, 0.0]
    assert schedule.rates() == {"default": 0.1, "no_weight_decay": 0.1}
    with pytest.raises(UserError, match=r"batch.weight_decay_rule=sqrt: no parameter has weight decay"):
        Schedule(build_optimizer(AdadeltaConfig(), module, CPU), lambda update: 1.0, LrRule.none, LrRule.sqrt)


def test_a_run_with_groups_goes_on_with_others(train: Callable[..., Ended], tmp_path: Path) -> None:
    options = [*TINY, "train.epochs=null", "optim=adamw", f"run_dir={tmp_path / 'run'}", "schedule=constant"]
    assert train(*options).status == 0
    first = train(*options, "train.max_updates=5", "optim.groups=[{match: [*.bias], lr: 0.5, name: biases}]")
    assert first.status == 0, first
    assert "2 parameter groups: default (" in first.out
    assert "optim.groups" in first.out, "what has changed is said"
    other = train(*options, "train.max_updates=7", "optim.layer_decay=0.5", "optim.groups=[]")
    assert other.status == 0, other
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "eval" not in line]
    assert not any(key.startswith(("lr/", "grad_norm/")) for key in lines[2])
    assert lines[4]["lr/biases"] == 0.5
    assert lines[4]["lr/default"] == lines[4]["lr"] == lines[2]["lr"]
    assert lines[4]["grad_norm/biases"] < lines[4]["grad_norm"]
    assert lines[6]["lr/block0"] == lines[6]["lr/block1"] / 2


def test_the_command_line_refuses_in_one_message(train: Callable[..., Ended]) -> None:
    assert (
        "optim.groups[0]: no parameter has a name like body.*"
        in train(*TINY, "optim.groups=[{match: [body.*]}]").message
    )
    said = train(*TINY, "train.clip_value=0.5").message
    assert "train.clip_norm=1.0 and train.clip_value=0.5 would clip the gradient twice" in said
    own = train(*TINY, "optim=custom", "optim._target_=torch.optim.NAdam", "optim.lr=0.01", "optim.layer_decay=0.5")
    assert own.status == 0, own

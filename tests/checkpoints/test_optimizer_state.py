"""What optimizers, and objects beside them, keep from step to step: a resumed run goes on with all of it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from distaccum.checkpoints import Checkpointer
from distaccum.checkpoints.encoding import decoded, encoded
from distaccum.checkpoints.folder import checkpoints_in, read_checkpoint
from distaccum.errors import UserError

Optimizer = torch.optim.Optimizer


class Run:
    """A small training, in which things are made in the order in which a script makes them."""

    def __init__(self, make: Callable[[Run], Optimizer], model: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3) if model is None else model
        self.scale = nn.Parameter(torch.ones(3))
        self.optimizer = make(self)
        self.scheduler: Any = None

    def step(self, number: int) -> None:
        inputs = torch.randn(5, *getattr(self.model, "shape", (4,)), generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        (self.model(inputs).flatten(1)[:, :3] * self.scale).square().sum().backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def checkpointer(self, folder: Path) -> Checkpointer:
        return Checkpointer(folder, self.model, self.optimizer)

    def values(self) -> list[Tensor]:
        return [p.detach() for group in self.optimizer.param_groups for p in group["params"]]


def goes_on(
    folder: Path,
    new: Callable[[], Run],
    *,
    late: Callable[[Run], None] = lambda run: None,
    extended: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Asserts that a run that is resumed after update 3 ends with the same bits as one that is not.

    Args:
        late: done after the Checkpointer has been made.
        extended: done before update 2, and before restoring.
    """
    run = new()
    saving = run.checkpointer(folder)
    late(run)
    if run.scheduler is not None:
        saving.states["scheduler"] = run.scheduler
    for number in range(7):
        if number == 1:
            extended(run)
        if number == 3:
            saving.save(3, {}, wait=True)
        run.step(number)
    again = new()
    restoring = again.checkpointer(folder)
    late(again)
    extended(again)
    if again.scheduler is not None:
        restoring.states["scheduler"] = again.scheduler
    restoring.restore(read_checkpoint(checkpoints_in(folder)[0]))
    for number in range(3, 7):
        again.step(number)
    assert all(torch.equal(one, other) for one, other in zip(run.values(), again.values(), strict=True))
    return again


def parameters(run: Run) -> list[nn.Parameter]:
    return list(run.model.parameters())


# Settings in the groups


class CountsInGroup(torch.optim.SGD):
    """As apex's FusedAdam and timm's Lamb: the step is a setting, which appears with the first one."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["window"] = (*group.get("window", ()), group["step"])[-2:]
            group["lr"] = 0.1 / sum(group["window"])
        super().step(closure)


class VectorInGroup(torch.optim.SGD):
    """A rate for each of several parts, in one tensor, and a function that says nothing of the run."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["rates"] = torch.tensor([0.1, 0.2], dtype=torch.float64)
            group["rule"] = max

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["rates"] *= 0.7
            group["lr"] = float(group["rates"].sum())
        super().step(closure)


@pytest.mark.parametrize("cls", [CountsInGroup, VectorInGroup])
def test_settings_that_change_on_the_way_come_back(tmp_path: Path, cls: Any) -> None:
    again = goes_on(tmp_path, lambda: Run(lambda run: cls(parameters(run), lr=0.1)))
    group = again.optimizer.param_groups[0]
    if cls is CountsInGroup:
        assert (group["step"], group["window"]) == (7, (6, 7))
    else:
        assert group["rates"].dtype == torch.float64


def test_a_setting_that_is_no_data_and_changes_is_refused(tmp_path: Path) -> None:
    run = Run(lambda run: VectorInGroup(parameters(run)))
    checkpointer = run.checkpointer(tmp_path)
    run.optimizer.param_groups[0]["rule"] = min
    with pytest.raises(UserError, match=r"^VectorInGroup changes rule in its parameter groups, and a checkpoint can't"):
        checkpointer.save(1, {})


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=50),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.5)], [4]
    ),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.1),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=9),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR's own
def test_schedulers_of_torch_go_on_whenever_they_are_made(tmp_path: Path, name: str) -> None:
    def schedule(run: Run) -> None:
        run.scheduler = SCHEDULERS[name](run.optimizer)

    def new() -> Run:
        return Run(lambda run: torch.optim.SGD(parameters(run), lr=0.05, momentum=0.9))

    rates = goes_on(tmp_path / "late", new, late=schedule).scheduler.get_last_lr()

    def scheduled() -> Run:
        run = new()
        schedule(run)
        return run

    assert goes_on(tmp_path / "early", scheduled).scheduler.get_last_lr() == rates
    assert rates != [0.05]


# Parameters and groups


def test_parameters_outside_the_model_go_on_with_their_state(tmp_path: Path) -> None:
    def new() -> Run:
        return Run(lambda run: torch.optim.AdamW([*run.model.parameters(), run.scale], lr=0.05))

    again = goes_on(tmp_path, new)
    assert not torch.equal(again.scale, torch.ones(3))
    without = Run(lambda run: torch.optim.AdamW(parameters(run), lr=0.05))
    with pytest.raises(UserError, match=r"don't have the same parameters besides the model's: number 2 of the optim"):
        without.checkpointer(tmp_path).restore(read_checkpoint(checkpoints_in(tmp_path)[0]))


def test_a_group_that_is_added_on_the_way(tmp_path: Path) -> None:
    def new() -> Run:
        return Run(lambda run: torch.optim.AdamW([run.model.weight], lr=0.05))  # type: ignore[list-item]

    def extended(run: Run) -> None:
        run.optimizer.add_param_group({"params": [run.model.bias], "lr": 0.01})

    again = goes_on(tmp_path, new, extended=extended)
    assert [group["lr"] for group in again.optimizer.param_groups] == [0.05, 0.01]
    run = new()
    with pytest.raises(UserError, match=r"holds 2 parameter groups of the optimizer, which has 1\. Give it as many"):
        run.checkpointer(tmp_path).restore(read_checkpoint(checkpoints_in(tmp_path)[0]))


# State


class Rich(torch.optim.SGD):
    """Keeps values of all kinds, of parameters and of none, and needs each of them."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["steps"] = (self.state["steps"] or 0) + 1  # type: ignore[index, operator]
        shared = self.state["global"]
        shared["updates"] = shared.get("updates", 0) + 1
        shared["mean"] = shared.get("mean", torch.zeros(())) * 0.9 + 0.1
        for group in self.param_groups:
            for parameter in group["params"]:
                own = self.state[parameter]
                if not own:
                    own.update(count=0, phase="warm", history=[], by_number={1: (0.5, None)}, absent=None, done=False)
                own["count"] += 1
                own["history"] = [*own["history"], parameter.grad.double().clone()][-2:]
                own["phase"] = {"warm": "hot", "hot": "cold", "cold": "warm"}[own["phase"]]
                own["by_number"] = {1: (own["by_number"][1][0] * 0.8, None)}
                assert own["absent"] is None
                assert own["done"] is False
                factor = {"warm": 1.0, "hot": 0.5, "cold": 0.1}[own["phase"]] * own["by_number"][1][0]
                factor /= own["count"] + shared["updates"]
                parameter.grad = (sum(own["history"]) * factor * shared["mean"]).to(parameter.dtype)
        super().step(closure)


class Both(Optimizer):
    """Two optimizers in one, whose `state_dict` says so."""

    def __init__(self, params: Any) -> None:
        every = list(params)
        super().__init__(every, {"lr": 0.05})
        self.matrices = torch.optim.SGD([p for p in every if p.ndim > 1], lr=0.05, momentum=0.9)
        self.rest = torch.optim.Adam([p for p in every if p.ndim <= 1], lr=0.05, fused=True)
        self.steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        self.matrices.param_groups[0]["lr"] = 0.1 / self.steps
        self.matrices.step()
        self.rest.step()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {"matrices": self.matrices.state_dict(), "rest": self.rest.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # type: ignore[override]
        self.matrices.load_state_dict(state["matrices"])
        self.rest.load_state_dict(state["rest"])
        self.steps = state["steps"]


@pytest.mark.parametrize("make", [lambda p: Rich(p, lr=0.05), Both], ids=["Rich", "Both"])
def test_state_of_every_kind_comes_back(tmp_path: Path, make: Any) -> None:
    goes_on(tmp_path, lambda: Run(lambda run: make(parameters(run))))


class Images(nn.Sequential):
    """A convolution whose memory is in the order channels_last, and a transposed matrix."""

    shape = (3, 6, 6)

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        self.to(memory_format=torch.channels_last)
        self[3].weight = nn.Parameter(torch.randn(64, 3).mul(0.1).t())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
        lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    ],
    ids=["adamw", "momentum", "adagrad"],
)
def test_state_comes_back_in_its_order_in_memory(tmp_path: Path, make: Any) -> None:
    again = goes_on(tmp_path, lambda: Run(lambda run: make(parameters(run)), Images()))
    for parameter, state in again.optimizer.state.items():
        moments = [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]
        assert moments
        assert all(value.stride() == parameter.stride() for value in moments)
    assert not again.model[0].weight.is_contiguous()  # type: ignore[index, union-attr, operator]


@pytest.mark.parametrize(
    "value",
    [
        {1: "a", "1": "b", 2.5: None, False: (1, [2, (3,)])},
        {"__tuple__": [1]},
        Counter({3: 2, 5: 1}),
        OrderedDict(b=1, a=(float("inf"), -0.0)),
        {"plain": [1, 2.5, "x", None, {"deep": ()}]},
    ],
)
def test_values_are_told_apart(value: Any) -> None:
    back = decoded(encoded(value))
    assert back == value
    assert repr(back) == repr(value)


def test_tensors_among_values() -> None:
    for tensor in (torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16), torch.tensor(True), torch.zeros(0, 3)):
        back = decoded(encoded([tensor]))[0]
        assert torch.equal(back, tensor)
        assert back.dtype == tensor.dtype
    with pytest.raises(TypeError, match="a Tensor of 5000 numbers"):
        encoded({"large": torch.zeros(5000)})
    kept: list[Tensor] = []
    strided = torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)
    back = decoded(encoded([strided], kept), [part.contiguous() for part in kept])[0]
    assert torch.equal(back, strided)
    assert back.stride() == strided.stride()

"""Saving and restoring in one process; tests/distributed has those on several ranks."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from distaccum.checkpoints import Checkpointer, export_model
from distaccum.checkpoints.folder import checkpoints_in, read_checkpoint
from distaccum.checkpoints.storage import write_safetensors
from distaccum.config import CheckpointConfig
from distaccum.config.enums import Goal
from distaccum.errors import UserError
from distaccum.runtime.randomness import random_state, set_random_state
from distaccum.strategies import strategy_of

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


class Tied(nn.Module):
    """Everything that a checkpoint must hold: shared and frozen parameters, buffers of all kinds, extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.norm(self.embedding(tokens)) * self.frozen * self.mask
        return self.head(self.dropout(hidden))

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def make(seed: int, optimizer: str = "adamw", dtype: torch.dtype = torch.float32) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = Tied().to(dtype)
    return model, OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])


def train(model: Tied, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Steps on random tokens; uses all three global generators."""
    losses = []
    for _ in range(steps):
        tokens = torch.randint(6, (5,)) * (1 if random.random() < 2 else 0) + int(np.random.rand() < 0)
        loss = model(tokens).square().mean() * random.gauss(1, 0.1) * float(np.random.randn() * 0.1 + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(autouse=True)
def _all_is_written() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def resumed(
    folder: Path, optimizer: str = "adamw", dtype: torch.dtype = torch.float32
) -> tuple[Tied, torch.optim.Optimizer]:
    model, fresh = make(99, optimizer, dtype)
    checkpointer = Checkpointer(folder, model, fresh)
    newest = checkpointer.newest()
    assert newest is not None
    checkpointer.restore(newest)
    return model, fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path, optimizer: str, dtype: torch.dtype) -> None:
    model, own = make(0, optimizer, dtype)
    train(model, own, 3)
    checkpointer = Checkpointer(tmp_path, model, own)
    checkpointer.save(3, {"epoch": 1}, wait=True)
    losses, weights = train(model, own, 4), values(model)
    other, fresh = resumed(tmp_path, optimizer, dtype)
    assert other.calls == 3
    assert all(map(math.isfinite, losses))
    assert train(other, fresh, 4) == losses
    assert equal(values(other), weights)


def test_a_folder_may_be_text(tmp_path: Path) -> None:
    model, own = make(0)
    Checkpointer(f"{tmp_path}/checkpoints", model, own).save(3, {}, wait=True)
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["update-00000003"]


def test_generators_that_are_not_restored_are_noticed(tmp_path: Path) -> None:
    model, optimizer = make(0)
    Checkpointer(tmp_path, model, optimizer).save(0, {}, wait=True)
    losses = train(model, optimizer, 4)
    other, fresh = resumed(tmp_path)
    torch.manual_seed(1)
    assert train(other, fresh, 4) != losses


def test_what_is_saved_is_the_state_at_the_call_and_not_later(tmp_path: Path) -> None:
    model, optimizer = make(0)
    checkpointer = Checkpointer(tmp_path, model, optimizer)
    for update in range(1, 6):  # the first copy makes its memory, the later ones fill it
        train(model, optimizer, 1)
        progress = {"list": [update]}
        checkpointer.save(update, progress)
        before = values(model)
        progress["list"].append("changed")
        train(model, optimizer, 3)
        checkpointer.wait()
        other, fresh = make(5)
        restored = Checkpointer(tmp_path, other, fresh).restore(read_checkpoint(checkpoints_in(tmp_path)[0]))
        assert restored == {"list": [update]}
        assert equal(values(other), before)


def test_optimizer_settings_that_it_changed_itself_come_back_and_new_ones_stay(tmp_path: Path) -> None:
    model, optimizer = make(0)
    checkpointer = Checkpointer(tmp_path, model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.5  # as an optimizer with a rate of its own does
    optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    checkpointer.save(1, {}, wait=True)
    other, fresh = make(1)
    fresh.param_groups[0]["weight_decay"] = 0.25  # configured anew
    fresh.param_groups[0]["betas"] = (0.7, 0.8)
    Checkpointer(tmp_path, other, fresh).restore(read_checkpoint(checkpoints_in(tmp_path)[0]))
    group = fresh.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.7, 0.8), 0.25)


class Counter:
    """Something of the user's own that belongs to the run."""

    def __init__(self) -> None:
        self.number = 0

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def test_states_of_ones_own_come_back(tmp_path: Path) -> None:
    model, optimizer = make(0)
    counter = Counter()
    counter.number = 7
    Checkpointer(tmp_path, model, optimizer, states={"counter": counter}).save(1, {}, wait=True)
    counter = Counter()
    checkpointer = Checkpointer(tmp_path, model, optimizer, states={"counter": counter, "new": Counter()})
    checkpointer.restore(read_checkpoint(checkpoints_in(tmp_path)[0]))
    assert counter.number == 7


# Refusals


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(4, 6), r"bias is missing from it; .*frozen is unknown to the model; .* more differences"),
        (None, r"frozen is \[4\] there and \[5\] here\. Configure the model that it was made of"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, model: nn.Module | None, said: str) -> None:
    saved, optimizer = make(0)
    Checkpointer(tmp_path, saved, optimizer).save(1, {}, wait=True)
    if model is None:
        model = Tied()
        model.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
    before = values(model)
    checkpointer = Checkpointer(tmp_path, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(UserError, match=rf"^the checkpoint holds another model: .*{said}"):
        checkpointer.restore(read_checkpoint(checkpoints_in(tmp_path)[0]))
    assert equal(values(model), before)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer = make(0)
    Checkpointer(tmp_path, model, optimizer).save(1, {}, wait=True)
    model, optimizer = make(0, "sgd")
    with pytest.raises(UserError, match=r"holds the state of AdamW, and the optimizer is SGD\. Configure the same"):
        Checkpointer(tmp_path, model, optimizer).restore(read_checkpoint(checkpoints_in(tmp_path)[0]))


class _Keeps(torch.optim.SGD):
    """Keeps something that no checkpoint takes, from its first step on."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sample"] = random.Random(0)


class _KeepsByObject(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.state[random] = {}  # type: ignore[index]


class _Counts(torch.optim.SGD):
    """Has its learning rate follow a count in an attribute."""

    count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.count
        super().step(closure)


class _Two(torch.optim.Optimizer):
    """Two optimizers in one: matrices are one's, all else the other's."""

    def __init__(self, params: Any) -> None:
        parameters = list(params)
        super().__init__(parameters, {})
        matrices = [p for p in parameters if p.ndim == 2]
        rest = [p for p in parameters if p.ndim != 2]
        self.first = torch.optim.SGD(matrices, lr=0.01, momentum=0.9)
        self.second = torch.optim.Adam(rest, lr=0.01, fused=True)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first.step()
        self.second.step()


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (_Keeps, r"_Keeps keeps a Random as the sample of a parameter, and a checkpoint holds"),
        (_Counts, r"_Counts keeps what changes from step to step in its attribute count, which its state_dict"),
        (_Two, r"_Two keeps what changes from step to step in its attribute first, which its state_dict"),
    ],
)
def test_an_optimizer_with_state_that_cannot_be_kept_is_refused_when_the_run_starts(
    tmp_path: Path, cls: Any, said: str
) -> None:
    model = Tied()
    arguments = {} if cls is _Two else {"lr": 0.1}
    with pytest.raises(UserError, match=said):
        Checkpointer(tmp_path, model, cls([p for p in model.parameters() if p.requires_grad], **arguments))


def test_what_shows_only_in_the_first_update_is_refused_after_it(tmp_path: Path) -> None:
    class Hidden(_KeepsByObject):
        def __init__(self, parameters: Any, learning_rate: float) -> None:  # so that no other one can be made
            super().__init__(parameters, lr=learning_rate)

    model = Tied()
    optimizer = Hidden([p for p in model.parameters() if p.requires_grad], 0.1)
    checkpointer = Checkpointer(tmp_path, model, optimizer)
    train(model, optimizer, 1)
    with pytest.raises(UserError, match=r"^Hidden keeps a module, which is no name, as the <module 'random' .*"):
        checkpointer.is_due(1)


def test_extra_state_and_states_that_cannot_be_kept_are_refused_when_the_run_starts(tmp_path: Path) -> None:
    model, optimizer = make(0)
    counter = Counter()
    counter.number = {1, 2}  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"^the state of counter can't be put into a checkpoint, .*: it has a set\. "):
        Checkpointer(tmp_path, model, optimizer, states={"counter": counter})
    model.calls = {1, 2}  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"^the extra state of the model can't be put into a checkpoint"):
        Checkpointer(tmp_path, model, optimizer)


# When


def test_every_so_many_updates(tmp_path: Path) -> None:
    config = CheckpointConfig(every_updates=3, every_minutes=None)
    checkpointer = Checkpointer(tmp_path, *make(0), config=config)
    due = []
    for update in range(1, 11):
        if checkpointer.is_due(update):
            due.append(update)
            checkpointer.save(update, {}, wait=True)
    assert due == [3, 6, 9]


def test_every_so_many_minutes_whatever_the_wall_clock_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    wall = iter([5e9, 1.0] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(wall))
    checkpointer = Checkpointer(tmp_path, *make(0), config=CheckpointConfig(every_minutes=2))
    due = []
    for update in range(1, 11):
        now += 50.0
        flags = frozenset(name for name, ask in checkpointer.flags.items() if ask())
        if checkpointer.is_due(update, flags):
            due.append(update)
            checkpointer.save(update, {}, wait=True)
    assert due == [3, 6, 9]


def test_a_checkpoint_that_falls_due_while_one_is_being_written_comes_later(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, *make(0), config=CheckpointConfig(every_updates=2, every_minutes=None))
    assert not checkpointer.is_due(2, frozenset(["saving"]))
    assert not checkpointer.is_due(3, frozenset(["saving"]))
    assert checkpointer.is_due(5)
    checkpointer.save(5, {}, wait=True)
    assert not checkpointer.is_due(7)
    assert checkpointer.is_due(8)


@given(
    losses=st.lists(st.sampled_from([0.1, 0.2, 0.3, math.nan, math.inf]), max_size=8),
    keep=st.integers(0, 3),
    goal=st.sampled_from([None, *Goal]),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_best_evaluations_are_known(tmp_path: Path, losses: list[float], keep: int, goal: Goal | None) -> None:
    config = CheckpointConfig(keep_best=keep, best_goal=goal)
    checkpointer = Checkpointer(tmp_path, *make(0), config=config)
    for update, loss in enumerate(losses):
        sign = -1 if goal is Goal.max else 1
        seen = [(sign * value, number) for number, value in enumerate(losses[: update + 1]) if not math.isnan(value)]
        expected = update in [number for _, number in sorted(seen)[:keep]]
        assert checkpointer.is_among_best(update, {"loss": loss}) is expected


def test_the_best_stay_and_are_remembered(tmp_path: Path) -> None:
    model, optimizer = make(0)
    config = CheckpointConfig(keep_last=1, keep_best=2, best_metric="accuracy")
    checkpointer = Checkpointer(tmp_path, model, optimizer, config=config)
    for update, accuracy in enumerate([0.5, 0.9, 0.2, 0.8, 0.1], 1):
        if checkpointer.is_among_best(update, {"accuracy": accuracy}):
            checkpointer.save(update, {}, wait=True)
    assert [path.name[-1] for path in checkpoints_in(tmp_path)] == ["4", "2"]
    again = Checkpointer(tmp_path, model, optimizer, config=config)
    again.restore(read_checkpoint(checkpoints_in(tmp_path)[0]))
    assert not again.is_among_best(6, {"accuracy": 0.7})
    assert again.is_among_best(7, {"accuracy": 0.85})


def test_an_unknown_metric_is_refused(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, *make(0), config=CheckpointConfig(keep_best=1, best_metric="f1"))
    with pytest.raises(UserError, match=r"^checkpoint\.best_metric=f1 is unknown: the evaluation has accuracy, loss\."):
        checkpointer.is_among_best(1, {"loss": 1.0, "accuracy": 0.5})


# Damage and full disks; tests/faults has real ones


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("distaccum")]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = make(0)
    checkpointer = Checkpointer(tmp_path, model, optimizer)
    for update in (1, 2):
        checkpointer.save(update, {}, wait=True)
    newest = checkpoints_in(tmp_path)[0] / "rank-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        found = checkpointer.newest()
    assert found is not None
    assert found.update == 1
    (said,) = _said(caplog)
    assert said.startswith(f"the checkpoint {newest.parent} is damaged and passed over: rank-00000.safetensors has ")


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make(0)
    (tmp_path / "file").write_text("not a folder")
    checkpointer = Checkpointer(tmp_path / "file" / "checkpoints", model, optimizer)
    with caplog.at_level(logging.WARNING):
        checkpointer.save(4, {})
        checkpointer.wait()
    (said,) = _said(caplog)
    assert said.startswith("the checkpoint of update 4 could not be saved: Not a directory (")
    assert said.endswith("Training goes on; there is none yet.")


# Files


def test_safetensors_of_ours_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True, False]),
        "bfloat16": torch.randn(3, 5).to(torch.bfloat16),
        "transposed": torch.arange(12).reshape(3, 4).t(),
        "large": torch.randn(1500, 1000),
    }
    write_safetensors(tmp_path / "file", tensors)
    read = load_file(tmp_path / "file")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert read.keys() == tensors.keys()


def test_the_exported_model_loads_into_a_plain_module(tmp_path: Path) -> None:
    def small() -> nn.Module:
        model = nn.Sequential(nn.Embedding(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False))
        model[2].weight = model[0].weight
        return model

    model, plain = small(), small()
    model(torch.tensor([1, 2, 3]))
    export_model(strategy_of(model), tmp_path, is_main=True)
    assert not equal(values(plain), values(model))
    load_model(plain, tmp_path / "model.safetensors")
    assert equal(values(plain), values(model))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_generators_come_back_whatever_they_have_drawn() -> None:
    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            float(np.random.randn()),
            float(np.random.rand()),
            float(torch.rand(())),
        ]

    for odd in (False, True):
        if odd:  # half a pair of normally distributed numbers is left over
            random.gauss(0, 1)
            np.random.randn()
        state = {name: value.clone() for name, value in random_state(torch.device("cpu")).items()}
        first = draw()
        draw()
        set_random_state(state, torch.device("cpu"))
        assert draw() == first


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"cls": torch.optim.Adam}, {"cls": torch.optim.Adam, "amsgrad": True}, "no max_exp_avg_sq of "),
        ({"cls": torch.optim.RMSprop}, {"cls": torch.optim.RMSprop, "momentum": 0.9}, "no momentum_buffer of "),
        ({"cls": torch.optim.SGD}, {"cls": torch.optim.SGD, "momentum": 0.9}, None),  # begins anew by itself
        ({"cls": torch.optim.Adam, "amsgrad": True}, {"cls": torch.optim.Adam}, None),
        ({"cls": torch.optim.Adafactor}, {"cls": torch.optim.Adafactor}, None),
    ],
)
def test_settings_that_need_more_state_than_there_is_are_refused(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], said: str | None
) -> None:
    def made(cls: Any, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        return module, cls(module.parameters(), lr=1e-3, **settings)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    module, optimizer = made(**before)
    step(module, optimizer)
    Checkpointer(tmp_path, module, optimizer).save(1, {}, wait=True)
    module, optimizer = made(**after)
    kept = values(module)
    restoring = Checkpointer(tmp_path, module, optimizer)
    if said is not None:
        with pytest.raises(UserError, match=said):
            restoring.restore(read_checkpoint(checkpoints_in(tmp_path)[0]))
        assert equal(values(module), kept)
        return
    restoring.restore(read_checkpoint(checkpoints_in(tmp_path)[0]))
    step(module, optimizer)


@pytest.mark.parametrize("formats", [("float32", "bfloat16"), ("float32", "float64"), ("float64", "float32")])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_state_follows_its_parameters_into_another_format(tmp_path: Path, formats: tuple[str, str], cls: Any) -> None:
    def made(dtype: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.Linear(3, 2).to(getattr(torch, dtype))
        more = {"momentum": 0.9} if cls is torch.optim.SGD else {}
        return module, cls(module.parameters(), lr=1e-3, **more)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module(torch.ones(2, 3, dtype=next(module.parameters()).dtype)).square().sum().backward()
        optimizer.step()

    module, optimizer = made(formats[0])
    step(module, optimizer)
    Checkpointer(tmp_path, module, optimizer).save(1, {}, wait=True)
    other, following = made(formats[1])
    Checkpointer(tmp_path, other, following).restore(read_checkpoint(checkpoints_in(tmp_path)[0]))
    for parameter in other.parameters():
        for key, value in following.state[parameter].items():
            assert value is None or value.dtype == (parameter.dtype if key != "step" else torch.float32)
    step(other, following)


def test_what_is_staged_is_written_bit_for_bit_and_goes_on_changing_without(tmp_path: Path) -> None:
    """Copies of one format share memory: odd shapes, orders of memory and formats beside each other stay apart."""
    model = nn.Module()
    values = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 2),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "large": torch.arange(1 << 20, dtype=torch.float32),
        "small": torch.arange(3, dtype=torch.int8),
        "pictures": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "brain": torch.randn(5).bfloat16(),
        "last": torch.randn(7, dtype=torch.float64),
    }
    for name, value in values.items():
        model.register_buffer(name, value.clone())
    model.weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    files = []
    for wait in (True, False, False):
        checkpointer = Checkpointer(tmp_path / str(len(files)), model, optimizer)
        for update in (1, 2):  # the second time into memory that is there
            checkpointer.save(update, {}, wait=wait)
            if not wait:
                model.large.add_(1)
                checkpointer.wait()
                model.large.sub_(1)
        (file,) = (tmp_path / str(len(files))).glob("*2/*.safetensors")
        files.append(file.read_bytes())
    assert files[0] == files[1] == files[2]
    stored = load_file(file)
    for name, value in values.items():
        assert torch.equal(stored[f"model/{name}@{','.join('0' * value.ndim)}"], value), name

"""A step takes no more temporaries than a bucket's, measured; taken bucket by bucket, it is the same bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from distaccum import Accumulator
from distaccum.config import SingleConfig
from distaccum.config.enums import Implementation, PrecisionName
from distaccum.config.optimizers import (
    AdadeltaConfig,
    AdafactorConfig,
    AdagradConfig,
    AdamaxConfig,
    AdamConfig,
    ASGDConfig,
    LionConfig,
    MuonConfig,
    NAdamConfig,
    RAdamConfig,
    RMSpropConfig,
    RpropConfig,
    ScheduleFreeConfig,
    ScheduleFreeSGDConfig,
    SGDConfig,
)
from distaccum.runtime.memory import metered
from distaccum.strategies import place
from distaccum.strategies.optimizers import _narrowed
from distaccum.training import buckets
from distaccum.training.optim import build_optimizer

CPU = torch.device("cpu")
WIDTH, LAYERS = 64, 12
TENSOR = 4 * WIDTH * WIDTH
BUCKET = 4 * TENSOR
FUSED: list[Any] = [
    SGDConfig(momentum=0.9, nesterov=True, weight_decay=0.1),
    AdagradConfig(),
    AdamConfig(_target_="torch.optim.AdamW", weight_decay=0.1),
]
IN_BUCKETS: list[Any] = [
    RMSpropConfig(momentum=0.5),
    AdadeltaConfig(weight_decay=0.1),
    RAdamConfig(),
    NAdamConfig(),
    AdamaxConfig(),
    ASGDConfig(),
    AdafactorConfig(weight_decay=0.1),
    RpropConfig(),
]
OTHERS: list[Any] = [LionConfig(weight_decay=0.1), MuonConfig(), ScheduleFreeConfig(), ScheduleFreeSGDConfig()]


def _name(config: Any) -> str:
    return str(type(config).__name__)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)), nn.Linear(WIDTH, 1))


def _update(accumulator: Accumulator, model: nn.Module) -> None:
    batches = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).split(2)
    with accumulator.window(batches) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(model(batch).square().sum(), len(batch))


def _temporaries(config: Any, **clipping: float) -> int:
    """Bytes that a step takes beyond parameters, gradients and state, at its highest point."""
    model = _model()
    accumulator = Accumulator(model, build_optimizer(config, model, CPU), **(clipping or {"clip_norm": 1.0}))
    with metered(CPU) as meter:
        for _ in range(2):  # the first one makes the state
            _update(accumulator, model)
            before, _ = meter.now, meter.lap()
            accumulator.step()
            taken = meter.lap() - before
    return taken


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", BUCKET)


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("config", [*FUSED, *IN_BUCKETS, *OTHERS], ids=_name)
def test_a_step_takes_no_more_than_a_bucket(config: Any) -> None:
    assert _temporaries(config) <= BUCKET


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("config", [*FUSED, *IN_BUCKETS], ids=_name)
def test_foreach_takes_as_much_as_all_parameters_where_it_is_asked_for(config: Any) -> None:
    assert _temporaries(dataclasses.replace(config, implementation=Implementation.foreach)) > LAYERS * TENSOR


def test_clipping_by_value_takes_nothing() -> None:
    assert _temporaries(SGDConfig(), clip_value=0.1) < TENSOR


def test_parameters_in_bfloat16_take_their_gradients_narrower_in_place() -> None:
    model = _model().to(torch.bfloat16)
    strategy = place(model, SingleConfig(), CPU, PrecisionName.bf16_params)
    accumulator = Accumulator(model, build_optimizer(AdamConfig(), model, CPU), strategy=strategy)
    with metered(CPU) as meter:
        for _ in range(2):
            with accumulator.window([torch.ones(2, WIDTH, dtype=torch.bfloat16)]) as micro_batches:
                for batch in micro_batches:
                    accumulator.backward(model(batch).float().square().sum(), 2)
            before, _ = meter.now, meter.lap()
            accumulator.step()
            taken = meter.lap() - before
    assert taken <= TENSOR


@pytest.mark.parametrize(
    "gradient",
    [
        torch.randn(8, 6),
        torch.randn(6, 8).t(),
        torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(100)[9:69].view(6, 10),
        torch.tensor(1.1),
    ],
    ids=["matrix", "transposed", "channels last", "part", "number"],
)
def test_a_gradient_of_any_layout_is_cast_in_place(gradient: Tensor) -> None:
    wanted, storage = gradient.to(torch.bfloat16), gradient.untyped_storage()
    found = _narrowed(gradient, torch.bfloat16)
    assert torch.equal(found, wanted)
    assert found.dtype is torch.bfloat16
    assert found.stride() == gradient.stride()
    assert found.untyped_storage().data_ptr() == storage.data_ptr()


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("config", [*IN_BUCKETS, OTHERS[0]], ids=_name)
def test_a_step_in_buckets_is_that_of_all_bit_for_bit(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[list[Tensor]] = []
    for is_whole in (False, True):
        if is_whole and hasattr(config, "implementation"):
            config = dataclasses.replace(config, implementation=Implementation.foreach)
        elif is_whole:
            monkeypatch.setattr(buckets, "BUCKET_BYTES", 10**9)
        model = _model()
        optimizer = build_optimizer(config, model, CPU)
        accumulator = Accumulator(model, optimizer)
        for _ in range(3):
            _update(accumulator, model)
            accumulator.step()
        ends.append([*model.parameters(), *(p for state in optimizer.state.values() for p in state.values())])
        assert len(optimizer.param_groups) == 1
        assert len(optimizer.param_groups[0]["params"]) == 2 * LAYERS + 2
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], _model()[0].weight)


@pytest.mark.usefixtures("small_buckets")
def test_hooks_closures_and_schedulers_see_one_step() -> None:
    parameters = [nn.Parameter(torch.ones(BUCKET)) for _ in range(3)]
    optimizer = build_optimizer(RMSpropConfig(), parameters, CPU)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda stepped, *_: seen.append(len(stepped.param_groups[0]["params"])))
    optimizer.register_step_post_hook(lambda stepped, *_: seen.append(len(stepped.state)))

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.stack([parameter.sum() for parameter in parameters]).sum()
        total.backward()
        seen.append("loss")
        return total

    assert float(optimizer.step(loss).detach()) == 3 * BUCKET
    schedule.step()
    assert seen == [3, "loss", 3]


@pytest.mark.usefixtures("small_buckets")
def test_schedulefree_steps_together_what_fits() -> None:
    for numbers, together in ((10, True), (BUCKET, False)):
        optimizer = build_optimizer(ScheduleFreeConfig(), [nn.Parameter(torch.ones(numbers))], CPU)
        assert isinstance(optimizer, schedulefree.AdamWScheduleFree)
        assert optimizer.param_groups[0]["foreach"] is together
    asked = build_optimizer(ScheduleFreeConfig(foreach=True), [nn.Parameter(torch.ones(BUCKET))], CPU)
    assert asked.param_groups[0]["foreach"] is True

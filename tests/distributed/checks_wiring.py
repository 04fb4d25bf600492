"""Checks that gradients cross the network once and wholly, however model, optimizers and strategies are put together:
an update is that of one shot in plain torch, or a message."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from examples import distance, flat
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distaccum import Accumulator, TaskOutput, Trainer, UserError, WindowLoader
from distaccum.checkpoints import Checkpointer
from distaccum.config import DDPConfig, LoopConfig
from distaccum.config.enums import Compression, PrecisionName
from distaccum.loaders import Window
from distaccum.runtime.devices import Precision
from distaccum.runtime.world import World
from distaccum.strategies import DDPStrategy, SingleStrategy, strategy_of
from distaccum.training.memory_line import MemoryLine
from distaccum.training.optim import Schedule
from distaccum.training.supervision import Supervision
from distaccum.training.update import Updater


class Net(nn.Module):
    """Two layers with a head each; the second head is used if it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.side = nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(5, 1)
        self.double()

    def forward(self, inputs: Tensor, side: bool = False) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        return self.second(hidden) + (self.side(hidden) if side else 0.0)


def batches_of(rank: int, window: int = 0) -> list[Tensor]:
    """Two micro-batches of unequal sizes; each rank's are others."""
    generator = torch.Generator().manual_seed(10 * rank + 100 * window)
    return [torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (2 + rank, 3)]


def all_batches(window: int = 0) -> Tensor:
    return torch.cat([batch for rank in range(dist.get_world_size()) for batch in batches_of(rank, window)])


def one_shot(model: nn.Module, window: int = 0, **options: Any) -> float:
    """Leaves the mean gradient of all ranks' samples in `.grad`; returns its norm."""
    model.zero_grad()
    model(all_batches(window), **options).square().mean().backward()
    return float(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]).norm())


def take(accumulator: Accumulator, model: Callable[..., Tensor], window: int = 0, **options: Any) -> Any:
    with accumulator.window(batches_of(dist.get_rank(), window)) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(model(batch, **options).square().sum(), len(batch))
    return accumulator.step()


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def _new(model: nn.Module, **options: Any) -> Accumulator:
    return Accumulator(model, sgd(model), **options)


def require_exact(accumulator: Accumulator, model: nn.Module, twin: nn.Module, window: int = 0) -> None:
    wanted = one_shot(twin, window, side=True)
    sgd(twin).step()
    found = take(accumulator, model, window, side=True)
    assert math.isclose(found.grad_norm, wanted, rel_tol=1e-12), (found.grad_norm, wanted)
    assert found.sync_calls > 0
    assert distance(flat(model), flat(twin)) < 1e-12


def check_one_model_has_one_strategy(world: World) -> None:
    """Two accumulators with an optimizer each, and one made anew."""
    model, twin = DistributedDataParallel(Net()), Net()
    both = [_new(model), _new(model)]
    for window in range(4):
        require_exact(both[window % 2], model, twin, window)
    both.clear()
    for window in range(4, 6):
        require_exact(_new(model, strategy=DDPStrategy(model)), model, twin, window)


def check_a_checkpointer_without_a_strategy_takes_the_models(world: World) -> None:
    for comes_first in (True, False):
        model, twin = DistributedDataParallel(Net()), Net()
        optimizer = sgd(model)
        folder = Path(tempfile.gettempdir(), "never written")
        accumulator = None if comes_first else Accumulator(model, optimizer)
        checkpointer = Checkpointer(folder, model, optimizer)
        require_exact(accumulator or Accumulator(model, optimizer), model, twin)
        assert checkpointer.strategy.traffic.calls > 0


def check_a_trainer_put_together_by_hand(world: World) -> None:
    model, twin = DistributedDataParallel(Net()), Net()
    samples = all_batches()

    def task(model: nn.Module, batch: Tensor) -> TaskOutput:
        return TaskOutput(model(batch, True).square().sum(), len(batch))

    optimizer = sgd(model)
    accumulator = Accumulator(model, optimizer)
    updater = Updater(
        task=task,
        accumulator=accumulator,
        schedule=Schedule(optimizer, lambda update: 1.0),
        precision=Precision(PrecisionName.fp64, "cpu"),
        supervision=Supervision(accumulator.strategy),
        memory_line=MemoryLine(accumulator.strategy, optimizer),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            updater=updater,
            loader=WindowLoader(
                samples,
                global_batch_size=len(samples),
                micro_batch_size=2,
                rank=world.rank,
                world_size=world.world_size,
            ),
            loop=LoopConfig(max_updates=1),
            checkpointer=Checkpointer(Path(world.gather(folder)[0], "checkpoints"), model, optimizer),
        )
        assert trainer.fit().is_saved
        world.gather(None)
    one_shot(twin, side=True)
    sgd(twin).step()
    assert distance(flat(model), flat(twin)) < 1e-12


def check_a_hook_of_somebody_elses_is_refused(world: World) -> None:
    model = DistributedDataParallel(Net())
    model.register_comm_hook(None, allreduce_hook)
    with pytest.raises(UserError, match="communication hook allreduce_hook already"):
        _new(model)


def check_a_second_strategy_with_another_compression_is_refused(world: World) -> None:
    model = DistributedDataParallel(Net())
    DDPStrategy(model, DDPConfig(compression=Compression.bf16))
    with pytest.raises(UserError, match="communication hook all_reduce_bf16_hook already"):
        DDPStrategy(model, DDPConfig())
    assert isinstance(strategy_of(model), DDPStrategy)


def check_a_strategy_of_one_rank_for_a_model_of_several_is_refused(world: World) -> None:
    model = DistributedDataParallel(Net())
    with pytest.raises(UserError, match=rf"is of 1 rank\(s\), .* of {world.world_size}"):
        _new(model, strategy=SingleStrategy(model.module))
    alone = Net()
    found = take(_new(alone, strategy=SingleStrategy(alone)), alone)
    samples = torch.cat(batches_of(world.rank))
    assert math.isclose(found.loss, float(Net()(samples).square().mean()), rel_tol=1e-12), "meant to train its own"


def check_fsdp_models_have_one_strategy_too(world: World) -> None:
    model, twin = Net(), Net()
    fully_shard(model)
    both = [_new(model), _new(model)]
    for window in range(3):
        require_exact(both[window % 2], model, twin, window)


def _refused(match: str, accumulator: Accumulator, model: Any, inside: nn.Module, **options: Any) -> None:
    before = flat(inside)
    with pytest.raises(UserError, match=match):
        take(accumulator, model, **options)
    assert torch.equal(flat(inside), before), "nothing has moved"


def check_parameters_that_never_cross_the_network_are_named(world: World) -> None:
    module = Net()
    module.side.requires_grad_(False)
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    accumulator = _new(model)
    take(accumulator, model, side=True)
    module.side.requires_grad_(True)
    _refused(r"would differ between ranks: side\.weight, side\.bias\. ", accumulator, model, module, side=True)

    module = Net()
    module._ddp_params_and_buffers_to_ignore = ["side.bias"]
    model = DistributedDataParallel(module)
    _refused(r"would differ between ranks: side\.bias\. ", _new(model), model, module, side=True)


def check_parameters_outside_the_model_are_named(world: World) -> None:
    for shard in (False, True):
        module, scale = Net(), nn.Parameter(torch.ones((), dtype=torch.float64))
        model = fully_shard(module) if shard else DistributedDataParallel(module)
        optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
        _refused(
            r"would differ between ranks: one outside the model, of shape \[\]",
            Accumulator(model, optimizer),
            lambda batch, model=model, scale=scale: model(batch, side=True) * scale,
            module,
        )


def check_a_last_micro_step_of_the_module_inside_is_refused(world: World) -> None:
    module = Net()
    model = DistributedDataParallel(module)
    accumulator = _new(model)
    take(accumulator, model, side=True)
    _refused("no gradient of this window has crossed", accumulator, module, module, side=True)
    require_exact(_new(model), model, _copy(module))


def _copy(module: nn.Module) -> nn.Module:
    twin = Net()
    twin.load_state_dict(module.state_dict())
    return twin


def check_gradients_that_differ_are_told_with_the_next_window(world: World) -> None:
    model = DistributedDataParallel(Net())
    accumulator = _new(model)
    for window, factor in ((0, 1.0), (1, 1.0 + 1e-3 * (world.rank == 1))):
        with accumulator.window(batches_of(world.rank, window)) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(model(batch, side=True).square().sum(), len(batch))
        model.module.first.weight.grad.mul_(factor)
        accumulator.step()
    with pytest.raises(UserError, match=rf"^update 2: the gradient's norm was \S+ on rank {world.rank}, "):
        take(accumulator, model, 2, side=True)


def check_a_parameter_that_the_loss_does_not_reach_is_named(world: World) -> None:
    module = Net()
    model = DistributedDataParallel(module, bucket_cap_mb=1e-6)  # buckets, some of which go off
    _refused(r"reach side\.weight, side\.bias on rank \d.* Set strategy\.find_unused", _new(model), model, module)
    for options in ({}, {"gradient_as_bucket_view": True}):
        model = DistributedDataParallel(Net(), find_unused_parameters=True, **options)
        assert math.isclose(take(_new(model), model).grad_norm, one_shot(Net()), rel_tol=1e-12)


def check_parameters_frozen_on_the_way_stop_under_every_strategy(world: World) -> None:
    """With momentum and weight decay; and go on when they are thawed."""
    for views in (True, False):
        model = DistributedDataParallel(Net(), gradient_as_bucket_view=views, find_unused_parameters=True)
        twin = Net()
        optimizers = [sgd(each, momentum=0.9, weight_decay=0.1) for each in (model, twin)]
        accumulator = Accumulator(model, optimizers[0])
        for window in range(6):
            for each in (model.module, twin):
                each.side.requires_grad_(window not in (2, 3))
            before = flat(model.module.side)
            one_shot(twin, window, side=True)
            optimizers[1].step()
            take(accumulator, model, window, side=True)
            assert torch.equal(flat(model.module.side), before) == (window in (2, 3))
            assert distance(flat(model), flat(twin)) < 1e-12, (views, window)


class Checkpointed(Net):
    """With a layer that the graph of its output doesn't show."""

    def forward(self, inputs: Tensor, side: bool = False) -> Tensor:
        inputs = inputs.detach().requires_grad_()
        hidden = checkpoint(lambda x: torch.tanh(self.first(x)), inputs, use_reentrant=True)
        return self.second(hidden) + self.side(hidden)


def check_ranks_without_samples_wait_for_checkpointed_layers_and_static_graphs(world: World) -> None:
    """A window smaller than the world: the last rank has a placeholder, whose gradients must come all the same."""
    is_last = world.rank == world.world_size - 1
    samples = all_batches()[: world.world_size - 1]
    for kind, options in ((Checkpointed, {}), (Checkpointed, {"static_graph": True}), (Net, {"static_graph": True})):
        model, twin = DistributedDataParallel(kind(), **options), Net()
        accumulator = _new(model)
        for number in range(3):
            window = Window(
                number=number,
                epoch=0,
                index=number,
                num_samples=len(samples),
                sizes=(0 if is_last else 1,),
                batches=iter([samples[:1] if is_last else samples[world.rank, None]]),
                sample_indices=list,
                equal_micro_steps=True,
            )
            with accumulator.window(window) as micro_batches:
                for batch in micro_batches:
                    accumulator.backward(model(batch, side=True).square().sum(), len(batch))
            found = accumulator.step()
            twin.zero_grad()
            twin(samples, side=True).square().mean().backward()
            sgd(twin).step()
            assert found.weight == len(samples)
            assert distance(flat(model), flat(twin)) < 1e-12, (kind, options, number)

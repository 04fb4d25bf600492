"""Between the gradient and the step, the same on any ranks as for one shot in plain torch, in float64: optimizers that
evaluate the loss themselves, functions that get the mean gradients, and norms of each block."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import CollectiveCounter, RaggedTokens, TokenClassifier, distance, flat, placed, token_loss
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from distaccum import Accumulator, Checkpointer, TaskOutput, UpdateResult, UserError, WindowLoader
from distaccum.checkpoints import newest_whole
from distaccum.config import DDPConfig, DPConfig, FSDPConfig
from distaccum.config.enums import Accumulate
from distaccum.loaders import Window
from distaccum.runtime.world import World
from distaccum.strategies import Strategy, needs_equal_micro_steps, shards_optimizer
from distaccum.strategies.dp import DPStrategy, ThreadedReplicas
from distaccum.training.layer_norms import LayerNorms, blocks_by_parameter
from distaccum.training.optim import build_optimizer

warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
UPDATES = 4


class SAM(torch.optim.SGD):
    """Sharpness-aware minimization (Foret et al. 2021): a step of SGD by the gradient at w + rho · g / |g|."""

    def __init__(self, params: Any, lr: float, rho: float = 0.05, momentum: float = 0.9) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
        for group in self.param_groups:
            group["rho"] = rho

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        loss = closure()
        moved = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for _, p in moved])
        ways = [p.grad * (group["rho"] / norm) for group, p in moved]
        for (_, p), way in zip(moved, ways, strict=True):
            p.add_(way)
        closure()
        for (_, p), way in zip(moved, ways, strict=True):
            p.sub_(way)
        super().step()
        return loss


def _lbfgs(line_search: str | None) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.LBFGS(params, lr=0.3, max_iter=4, history_size=3, line_search_fn=line_search)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "lbfgs": _lbfgs(None),
    "lbfgs, line search": _lbfgs("strong_wolfe"),
    "sam": lambda params: SAM(params, lr=0.1),
}
STRATEGIES: dict[str, Any] = {"single": None, "dp": DPConfig(), "ddp": DDPConfig(), "fsdp": FSDPConfig()}


def _one_shot(
    make: Callable[[Any], torch.optim.Optimizer], clip_norm: float | None, average: bool = True
) -> tuple[list[float], list[int], Tensor]:
    """Plain torch: a closure of the whole window, as anybody would write it."""
    model = TokenClassifier()
    optimizer: Any = make(model.parameters())
    losses, evaluations = [], []
    for window in _windows(global_batch_size=16, micro_batch_size=16, rank=0, world_size=1):
        (batch,) = window
        evaluations.append(0)

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss_sum, weight = token_loss(model, batch)
            loss = loss_sum / weight if average else loss_sum
            loss.backward()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            evaluations[-1] += 1
            return loss.detach()

        losses.append(float(optimizer.step(closure)))
    return losses, evaluations, flat(model)


def _sgd(params: Any, **_: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


PLACEMENTS: dict[str, Any] = {
    "single": None,
    "ddp": DDPConfig(),
    "zero-1": DDPConfig(shard_optimizer=True),
    "fsdp": FSDPConfig(),
    "fsdp, node": FSDPConfig(accumulate=Accumulate.node, shard_size=2),
}


def _one_shot_gradients(clip_norm: float, factor: float = 1.0) -> tuple[list[dict[str, Tensor]], list[Any], Tensor]:
    """Mean gradients of each window before clipping; by hand, ‖g‖ and ‖Δw‖ / ‖w‖ of each block; the parameters."""
    model = TokenClassifier()
    optimizer = _sgd(model.parameters())
    gradients: list[dict[str, Tensor]] = []
    layers: list[dict[str, dict[str, float]]] = []
    for window in _windows(global_batch_size=16, micro_batch_size=16, rank=0, world_size=1):
        loss_sum, weight = token_loss(model, *window)
        optimizer.zero_grad()
        (loss_sum / weight).backward()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        torch._foreach_mul_([p.grad for p in model.parameters()], factor)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        layers.append({})
        for block in ("embedding", "hidden", "out"):
            names = [name for name in before if name.startswith(block)]
            weights = torch.cat([before[name].flatten() for name in names])
            now = torch.cat([model.get_parameter(name).detach().flatten() for name in names])
            norm = torch.cat([gradients[-1][name].flatten() for name in names]).norm()
            ratio = (now - weights).norm() / weights.norm()
            layers[-1][block] = {"grad_norm": float(norm), "update_ratio": float(ratio)}
    return gradients, layers, flat(model)


def _windows(**options: Any) -> Iterator[Window]:
    """Windows of 16, 16 and 9 sequences of unequal lengths, and so on."""
    loader = WindowLoader(RaggedTokens(), seed=1, **options)
    count = 0
    while True:
        for window in loader:
            yield window
            count += 1
            if count == UPDATES:
                return


class Run:
    def __init__(
        self,
        world: World,
        config: Any,
        make: Callable[[Any], torch.optim.Optimizer],
        **options: Any,
    ) -> None:
        module = TokenClassifier()
        self.strategy: Strategy = placed(module, None if isinstance(config, DPConfig) else config)
        if isinstance(config, DPConfig):  # whose `place` wants to be alone
            self.strategy = DPStrategy(ThreadedReplicas(module, 2))
        if config is not None and shards_optimizer(config):
            parameters = self.strategy.model.parameters()
            self.optimizer: Any = ZeroRedundancyOptimizer(parameters, optimizer_class=make, lr=0.1)  # type: ignore[arg-type]
        else:
            self.optimizer = make(self.strategy.model.parameters())
        self.accumulator = Accumulator(self.strategy.model, self.optimizer, strategy=self.strategy, **options)
        is_spread = isinstance(config, DDPConfig | FSDPConfig)
        self.here = {"rank": world.rank if is_spread else 0, "world_size": world.world_size if is_spread else 1}
        self.here["equal_micro_steps"] = config is not None and needs_equal_micro_steps(config)

    def forward(self, batch: Any) -> TaskOutput:
        loss_sum, weight = token_loss(self.strategy.model, batch)
        return TaskOutput(loss_sum, weight)

    def train(self, **batch: Any) -> list[UpdateResult]:
        windows = _windows(**{"global_batch_size": 16, "micro_batch_size": 3, **batch}, **self.here)
        results = [self.accumulator.run(window, self.forward) for window in windows]
        self.strategy.at_rest()
        return results


def check_every_placement_makes_the_update_of_one_shot(world: World) -> None:
    for name, make in OPTIMIZERS.items():
        for clip_norm in (None, 0.3) if name == "sam" else (None,):
            losses, evaluations, wanted = _one_shot(make, clip_norm)
            assert max(evaluations) > 1
            for placement, config in STRATEGIES.items():
                if placement == "fsdp" and name != "sam":
                    continue  # refused
                where = (name, placement, clip_norm)
                run = Run(world, config, make, clip_norm=clip_norm)
                results = run.train()
                assert [result.evaluations for result in results] == evaluations, where
                assert distance([result.loss for result in results], losses) < 1e-12, (
                    where,
                    [r.loss for r in results],
                    losses,
                )
                assert distance(flat(run.strategy.module), wanted) < 1e-12, where
                assert run.accumulator.updates == UPDATES
                seen = world.gather(([result.loss for result in results], flat(run.strategy.module).tolist()))
                assert all(entry == seen[0] for entry in seen), where


def check_a_wrong_formula_would_be_noticed(world: World) -> None:
    """The sum in place of the mean; one gradient for all evaluations."""
    for name, make in OPTIMIZERS.items():
        _, _, wanted = _one_shot(make, None)
        assert distance(_one_shot(make, None, average=False)[2], wanted) > 1e-3, name
    make = OPTIMIZERS["sam"]
    run = Run(world, DDPConfig(), lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    run.train()
    assert distance(flat(run.strategy.module), _one_shot(make, None)[2]) > 1e-6


def check_each_evaluation_syncs_once(world: World) -> None:
    for config, make in ((DDPConfig(), OPTIMIZERS["lbfgs, line search"]), (FSDPConfig(), OPTIMIZERS["sam"])):
        run = Run(world, config, make)
        plain = Run(world, config, lambda params: torch.optim.SGD(params, lr=0.1))
        once = plain.train()[0]
        for result in run.train():
            assert result.evaluations > 1
            assert result.sync_calls == result.evaluations * once.sync_calls
            assert result.sync_bytes == result.evaluations * once.sync_bytes


def check_a_resumed_run_goes_on_bit_for_bit(world: World) -> None:
    options = {"rank": world.rank, "world_size": world.world_size}
    batches = [list(window) for window in _windows(global_batch_size=16, micro_batch_size=3, **options)]
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.from_main(own))

        def started() -> tuple[Run, Checkpointer]:
            run = Run(world, DDPConfig(), OPTIMIZERS["lbfgs, line search"])
            checkpointer = Checkpointer(folder, run.strategy.model, run.optimizer, strategy=run.strategy)
            checkpointer.states["accumulator"] = run.accumulator
            return run, checkpointer

        run, checkpointer = started()
        for number, window in enumerate(batches):
            if number == 2:
                checkpointer.save(2, {}, wait=True)
            run.accumulator.run(window, run.forward)
        again, checkpointer = started()
        checkpoint = newest_whole(folder, rank=world.rank, gather=world.gather)
        assert checkpoint is not None
        # As the trainer does: DDP lays its buckets out by the first backward.
        again.strategy.warm_up(lambda: again.forward(batches[0][0]).loss_sum)
        checkpointer.restore(checkpoint)
        for window in batches[2:]:
            again.accumulator.run(window, again.forward)
        assert torch.equal(flat(again.strategy.module), flat(run.strategy.module))
        world.gather(None)  # before the folder goes


def check_shards_are_refused_where_the_optimizer_needs_the_whole(world: World) -> None:
    with pytest.raises(UserError, match=r"strategy=fsdp does not support LBFGS: .*\. Set strategy=ddp or take another"):
        Run(world, FSDPConfig(), OPTIMIZERS["lbfgs"])
    for section in ({"_target_": "torch.optim.LBFGS", "lr": 0.3}, {"_target_": f"{__name__}.SAM", "lr": 0.3}):
        strategy = placed(TokenClassifier(), config := DDPConfig(shard_optimizer=True))
        parameters = strategy.model.parameters()
        optimizer = build_optimizer(section, parameters, torch.device("cpu"), shard=shards_optimizer(config))
        with pytest.raises(UserError, match=r"shard_optimizer=true .* does not support (LBFGS|SAM), which evaluates"):
            Accumulator(strategy.model, optimizer, strategy=strategy)


def check_on_gradients_gets_the_mean_gradient_of_one_shot(world: World) -> None:
    for factor in (1.0, 0.5):
        wanted, _, wanted_parameters = _one_shot_gradients(0.3, factor)
        for placement, config in PLACEMENTS.items():
            found: list[dict[str, Tensor]] = []

            def hook(
                named: Mapping[str, Tensor], found: list[dict[str, Tensor]] = found, factor: float = factor
            ) -> None:
                found.append({n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in named.items()})
                if factor != 1:
                    for gradient in named.values():
                        gradient.mul_(factor)

            run = Run(world, config, _sgd, clip_norm=0.3, on_gradients=hook)
            results = run.train()
            for mine, reference, result in zip(found, wanted, results, strict=True):
                assert list(mine) == list(reference), placement
                assert all(distance(mine[name], reference[name]) < 1e-12 for name in mine), placement
                norm = torch.cat([gradient.flatten() for gradient in reference.values()]).norm() * factor
                assert distance(result.grad_norm, norm) < 1e-12, placement
            assert distance(flat(run.strategy.module), wanted_parameters) < 1e-12, placement
    # Clipped before the hook, and not after it, half the gradient would be as if clipped to half the norm.
    assert distance(_one_shot_gradients(0.15)[2], wanted_parameters) > 1e-3


def check_layer_norms_are_those_computed_by_hand(world: World) -> None:
    _, wanted, _ = _one_shot_gradients(0.3)
    blocks = blocks_by_parameter(TokenClassifier())
    for placement, config in PLACEMENTS.items():
        plain = Run(world, config, _sgd, clip_norm=0.3)
        run = Run(world, config, _sgd, clip_norm=0.3)
        norms = LayerNorms(run.accumulator, blocks, every_updates=2)
        options = {"global_batch_size": 16, "micro_batch_size": 3, **run.here}
        found = []
        for number, (window, same) in enumerate(zip(_windows(**options), _windows(**options), strict=True), 1):
            with CollectiveCounter() as without:
                plain.accumulator.run(same, plain.forward)
            with CollectiveCounter() as counter:
                norms.begin(number)
                run.accumulator.run(window, run.forward)
                found.append(norms.end())
            more = len(counter.collectives) - len(without.collectives)
            assert more == (placement.startswith("fsdp") and number % 2 == 0), (placement, number)
            assert counter.host_syncs == without.host_syncs, (placement, number)  # those of tolist() aren't counted
        assert [layers is None for layers in found] == [True, False, True, False], placement
        for mine, reference in ((found[1], wanted[1]), (found[3], wanted[3])):
            assert mine is not None
            assert list(mine) == list(reference)
            for block, values in reference.items():
                for key, value in values.items():
                    assert abs(mine[block][key] - value) < 1e-12 * value, (placement, block, key)
        # Neither another update's, nor another block's, nor the gradient after clipping.
        assert abs(found[1]["hidden"]["grad_norm"] - wanted[0]["hidden"]["grad_norm"]) > 1e-6  # type: ignore[index]
        assert abs(found[1]["hidden"]["update_ratio"] - wanted[1]["out"]["update_ratio"]) > 1e-6  # type: ignore[index]

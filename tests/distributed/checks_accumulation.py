"""Checks of the accumulator under DDP, on real ranks."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from examples import (
    CollectiveCounter,
    RaggedTokens,
    TokenClassifier,
    adamw,
    calls_in,
    curves,
    distance,
    flat,
    replaced,
    token_loss,
    train_tokens,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distaccum import Accumulator, UserError, WindowLoader
from distaccum.config import DDPConfig
from distaccum.config.enums import Compression
from distaccum.loaders import Window
from distaccum.runtime.world import World
from distaccum.strategies import DDPStrategy, SingleStrategy
from distaccum.strategies.ddp import place_ddp


def _one_shot(**options: Any) -> tuple[Any, Tensor]:
    return train_tokens(None, micro_batch_size=16, **options)


def check_any_cut_gives_the_same_update(world: World) -> None:
    """Ragged windows (41 samples in windows of 16), unequal lengths, ignored targets, clipping, AdamW, float64."""
    wanted, wanted_parameters = _one_shot()
    assert any(result.grad_norm > 0.05 for result in wanted), "clipping must act"
    for batch in (
        {"micro_batch_size": 1},
        {"micro_batch_size": 3},
        {"accumulation_steps": 2},
        {"micro_batch_size": 16},
    ):
        found, parameters = train_tokens(DDPConfig(), rank=world.rank, world_size=world.world_size, **batch)
        for mine, reference in zip(curves(found), curves(wanted), strict=True):
            assert distance(mine, reference) < 1e-12
        assert distance(parameters, wanted_parameters) < 1e-12
        assert [result.weight for result in found] == [result.weight for result in wanted]


def check_float32_agrees_within_rounding(world: World) -> None:
    wanted, wanted_parameters = _one_shot(dtype=torch.float32)
    found, parameters = train_tokens(
        DDPConfig(), rank=world.rank, world_size=world.world_size, micro_batch_size=2, dtype=torch.float32
    )
    assert distance(curves(found)[0], curves(wanted)[0]) < 1e-5
    assert distance(parameters, wanted_parameters) < 1e-4


def check_a_mean_of_means_misses(world: World) -> None:
    """The negative control: what accumulation tutorials do (mean per micro-batch, divided by K) is far off."""

    def mean_of_means(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        loss_sum, weight = token_loss(model, batch)
        return loss_sum / weight.clamp(min=1), 1.0

    wanted, wanted_parameters = _one_shot()
    found, parameters = train_tokens(
        DDPConfig(), rank=world.rank, world_size=world.world_size, micro_batch_size=2, loss=mean_of_means
    )
    assert distance(curves(found)[0], curves(wanted)[0]) > 1e-2
    assert distance(curves(found)[1], curves(wanted)[1]) > 1e-2
    assert distance(parameters, wanted_parameters) > 1e-2


def _synced(world: World, steps: int, no_sync: Any = None) -> tuple[set[int], set[int], list[Any]]:
    with CollectiveCounter() as counter:
        original = DDPStrategy.no_sync
        with replaced(DDPStrategy, "no_sync", no_sync or original):
            results, _ = train_tokens(
                DDPConfig(bucket_cap_mb=0.001),
                rank=world.rank,
                world_size=world.world_size,
                global_batch_size=32,
                accumulation_steps=steps,
                drop_last=True,  # without no_sync, ranks with unequal micro-steps would wait for each other for ever
                updates=4,
            )
    # The first update is made with DDP's provisional buckets.
    counted = results[1:]
    return {r.sync_calls for r in counted}, {r.sync_bytes for r in counted}, counter.collectives


def check_one_sync_per_update_whatever_the_steps(world: World) -> None:
    by_steps = {steps: _synced(world, steps) for steps in (1, 2, 8)}
    calls, sent, _ = by_steps[1]
    assert len(calls) == len(sent) == 1
    assert min(calls) > 1, "several buckets, so that the count says something"
    assert min(sent) == flat(TokenClassifier()).nbytes
    assert all(found[:2] == (calls, sent) for found in by_steps.values())


def check_without_no_sync_there_are_k_times_as_many(world: World) -> None:
    (once,), (sent_once,), _ = _synced(world, 1)
    (often,), (sent_often,), _ = _synced(world, 8, no_sync=lambda strategy: nullcontext())
    assert (often, sent_often) == (8 * once, 8 * sent_once)


def check_a_window_of_one_micro_step_takes_no_detour(world: World) -> None:
    """It is DDP's own forward and backward, never inside `no_sync`."""

    def entered(steps: int) -> int:
        run = partial(_synced, world, steps)
        return calls_in(DistributedDataParallel, "no_sync", run)

    assert entered(1) == 0
    assert entered(2) == 4, "each update's first micro-step"


def check_the_count_is_what_torch_dispatched(world: World) -> None:
    """The counters against torch's own dispatcher."""
    with CollectiveCounter() as counter:
        results, _ = train_tokens(
            DDPConfig(), rank=world.rank, world_size=world.world_size, accumulation_steps=2, updates=3
        )
    reduced = [size for name, size in counter.collectives if "allreduce" in name]
    assert len(reduced) == sum(result.sync_calls for result in results), "nothing but the gradients' all-reduces"
    # Loss, weight, whether the sums differ and the last norm are sent with them: 8 bytes each, an element a byte, in
    # places of each rank.
    sent_with_them = 4 * 8 * 8 * world.world_size
    assert sum(reduced) == sum(result.sync_bytes for result in results) + 3 * sent_with_them


def check_gradients_meet_at_the_boundary_only(world: World) -> None:
    """After each micro-step but the last the ranks' gradients differ; after the last they agree with the true sum."""
    model = DistributedDataParallel(TokenClassifier())
    twin = TokenClassifier()
    accumulator = Accumulator(model, adamw(model))
    loader = WindowLoader(RaggedTokens(), global_batch_size=24, accumulation_steps=3, seed=1)
    window = next(iter(loader))
    before = flat(model)
    with accumulator.window(window) as micro_batches:
        for step, batch in enumerate(micro_batches, 1):
            accumulator.backward(*token_loss(model, batch))
            mine = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
            everyone = world.gather(mine)
            agree = all(torch.equal(everyone[0], other) for other in everyone)
            assert agree == (step == 3)
            assert torch.equal(flat(model), before), "parameters move in step() only"
    data = RaggedTokens()
    samples = [data[i] for rank in world.gather(window.sample_indices) for indices in rank for i in indices]
    loss_sum, weight = token_loss(twin, data.collate_fn(samples))
    (loss_sum / weight).backward()
    wanted = torch.cat([p.grad.reshape(-1) for p in twin.parameters() if p.grad is not None])
    # Up to here the gradient is a sum, scaled; its direction is that of the true mean.
    assert distance(mine / mine.norm(), wanted / wanted.norm()) < 1e-12
    assert math.isclose(accumulator.step().grad_norm, float(wanted.norm()), rel_tol=1e-12)


def check_an_exception_leaves_no_sync_and_drops_the_window(world: World) -> None:
    model = DistributedDataParallel(TokenClassifier())
    accumulator = Accumulator(model, adamw(model))
    batches = [RaggedTokens.collate_fn([RaggedTokens()[i]]) for i in (world.rank, world.rank + 4)]
    try:
        with accumulator.window(batches) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(*token_loss(model, batch))
                assert not model.require_backward_grad_sync
                raise KeyError("in the middle of the window")
    except KeyError:
        pass
    assert model.require_backward_grad_sync
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with accumulator.window(batches) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(*token_loss(model, batch))
    found = accumulator.step().loss
    everyone = world.gather(batches)
    sums = [token_loss(TokenClassifier(), batch) for rank in everyone for batch in rank]
    assert math.isclose(found, float(sum(s.detach() for s, _ in sums) / sum(w for _, w in sums)), rel_tol=1e-12)


def check_a_rank_with_nothing_to_do_adds_nothing_not_even_nan(world: World) -> None:
    for find_unused in (False, True):
        _placeholder(world, find_unused)


def _placeholder(world: World, find_unused: bool) -> None:
    size = world.world_size - 1
    data = RaggedTokens(size)
    model = DistributedDataParallel(TokenClassifier(), find_unused_parameters=find_unused)
    twin = TokenClassifier()
    accumulator, alone = Accumulator(model, adamw(model)), Accumulator(twin, adamw(twin), strategy=SingleStrategy(twin))
    mine = [data[world.rank]] if world.rank < size else [data[0]]
    window = Window(
        number=0,
        epoch=0,
        index=0,
        num_samples=size,
        sizes=(1 if world.rank < size else 0,),
        batches=iter([data.collate_fn(mine)]),
        sample_indices=list,
    )
    with accumulator.window(window) as micro_batches:
        for batch in micro_batches:
            loss_sum, weight = token_loss(model, batch)
            if world.rank == size:
                loss_sum = loss_sum * math.nan
            accumulator.backward(loss_sum, weight, {"seen": torch.ones(2)})
    found = accumulator.step()
    with alone.window([data.collate_fn([data[i] for i in range(size)])]) as micro_batches:
        for batch in micro_batches:
            alone.backward(*token_loss(twin, batch))
    wanted = alone.step()
    assert math.isclose(found.loss, wanted.loss, rel_tol=1e-12)
    assert math.isclose(found.grad_norm, wanted.grad_norm, rel_tol=1e-12)
    assert found.sums["seen"].tolist() == [size, size]
    assert distance(flat(model), flat(twin)) < 1e-12


def check_ragged_epochs_of_a_loader_have_placeholders(world: World) -> None:
    """An epoch whose last window is a single sample, on 2 and 4 ranks."""
    for find_unused in (False, True):
        options = {"global_batch_size": 8, "updates": 12}
        wanted, wanted_parameters = train_tokens(None, micro_batch_size=8, **options)
        found, parameters = train_tokens(
            DDPConfig(find_unused_parameters=find_unused),
            rank=world.rank,
            world_size=world.world_size,
            micro_batch_size=1,
            **options,
        )
        assert len(RaggedTokens()) % 8 == 1
        assert distance(curves(found)[0], curves(wanted)[0]) < 1e-12
        assert distance(parameters, wanted_parameters) < 1e-12


def check_equal_micro_steps_are_exact_too(world: World) -> None:
    options = {"global_batch_size": 9, "updates": 10}
    _, wanted_parameters = train_tokens(None, micro_batch_size=9, **options)
    found, parameters = train_tokens(
        DDPConfig(),
        rank=world.rank,
        world_size=world.world_size,
        micro_batch_size=2,
        equal_micro_steps=True,
        **options,
    )
    assert len(set(world.gather(tuple(result.micro_steps for result in found)))) == 1
    assert distance(parameters, wanted_parameters) < 1e-12


def check_ddp_options_are_exact(world: World) -> None:
    _, wanted = _one_shot()
    for config, equal in (
        (DDPConfig(static_graph=True), True),
        (DDPConfig(static_graph=True, gradient_as_bucket_view=False), True),
        (DDPConfig(gradient_as_bucket_view=False), False),
        (DDPConfig(find_unused_parameters=True), False),
        (DDPConfig(broadcast_buffers=False, bucket_cap_mb=0.001), False),
    ):
        results, parameters = train_tokens(
            config, rank=world.rank, world_size=world.world_size, micro_batch_size=2, equal_micro_steps=equal
        )
        assert distance(parameters, wanted) < 1e-12, config
        assert len({result.sync_calls for result in results[2:]}) == 1


class _Branches(nn.Module):
    """Uses one half of its parameters or the other, as the batch says; a third part never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.never = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 1)
        self.double()

    def forward(self, inputs: Tensor, branch: int) -> Tensor:
        return (self.left if branch == 0 else self.right)(inputs)


def check_parameters_unused_in_the_last_micro_step(world: World) -> None:
    """Used in an earlier micro-step, on one rank only, in some windows only, or never: as in a single process."""
    torch.manual_seed(9)
    batches = [[(torch.randn(2, 3).double(), rank % 2 if step == 0 else 0) for step in range(2)] for rank in range(4)]
    batches = batches[: world.world_size]
    windows = [batches, [[(inputs, 0) for inputs, _ in steps] for steps in batches], batches]

    def run(model: nn.Module, strategy: Any, mine: Any) -> Tensor:
        accumulator = Accumulator(model, adamw(model), strategy=strategy)
        for window in windows:
            with accumulator.window(mine(window)) as micro_batches:
                for inputs, branch in micro_batches:
                    accumulator.backward(model(inputs, branch).square().sum(), len(inputs))
            accumulator.step()
        return flat(model)

    model = DistributedDataParallel(_Branches(), find_unused_parameters=True)
    twin = _Branches()
    found = run(model, None, lambda window: window[world.rank])
    wanted = run(twin, SingleStrategy(twin), lambda window: [step for steps in window for step in steps])
    assert distance(found, wanted) < 1e-12


def check_compression_is_near_and_smaller(world: World) -> None:
    options: dict[str, Any] = {"rank": world.rank, "world_size": world.world_size, "micro_batch_size": 2, "updates": 6}
    exact, wanted = train_tokens(DDPConfig(), dtype=torch.float32, **options)
    for compression, tolerance in ((Compression.fp16, 1e-3), (Compression.bf16, 1e-2), (Compression.powersgd, 0.2)):
        results, parameters = train_tokens(
            DDPConfig(compression=compression, powersgd_start_update=2), dtype=torch.float32, **options
        )
        assert 0 < distance(parameters, wanted) < tolerance, (compression, distance(parameters, wanted))
        assert len(set(world.gather(tuple(parameters.tolist())))) == 1, "all ranks have the same parameters"
        if compression is Compression.powersgd:
            assert results[0].sync_calls == 1  # not compressed yet
            assert results[-1].sync_calls == 3  # what isn't a matrix, P, and Q
            assert results[-1].sync_bytes < exact[-1].sync_bytes
        else:
            assert results[-1].sync_bytes * 2 == exact[-1].sync_bytes
            assert results[-1].sync_calls == exact[-1].sync_calls


def check_powersgd_forgets_a_window_that_was_skipped(world: World) -> None:
    config = DDPConfig(compression=Compression.powersgd, powersgd_start_update=2)
    strategy = place_ddp(TokenClassifier(torch.float32), config, torch.device("cpu"))
    accumulator = Accumulator(strategy.model, adamw(strategy.model), skip_nonfinite=True, strategy=strategy)
    skipped = []
    for update in range(7):
        _window_with_nan(strategy.model, accumulator, rank_is_bad=update == 4 and world.rank == 1)
        skipped.append(accumulator.step().skipped)
    assert skipped == [update == 4 for update in range(7)]
    assert len(set(world.gather(tuple(flat(strategy.module).tolist())))) == 1


def check_unequal_windows_are_refused_where_they_would_hang(world: World) -> None:
    strategy = place_ddp(TokenClassifier(), DDPConfig(static_graph=True), torch.device("cpu"))
    accumulator = Accumulator(strategy.model, adamw(strategy.model), strategy=strategy)
    window = next(iter(WindowLoader(RaggedTokens(), global_batch_size=33, micro_batch_size=16)))
    with pytest.raises(UserError, match="equally many micro-steps"), accumulator.window(window):
        pass


def check_float16_buckets_hold_sums_over_many_tokens(world: World) -> None:
    """A gradient of sums beyond float16's 65504 still goes through float16 buckets, as its mean is small."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    strategy = place_ddp(model, DDPConfig(compression=Compression.fp16), torch.device("cpu"))
    accumulator = Accumulator(strategy.model, torch.optim.SGD(model.parameters(), lr=0.0), strategy=strategy)
    norms = []
    for _ in range(3):
        inputs = torch.full((1000, 1), 100.0)
        with accumulator.window([inputs]) as micro_batches:
            for batch in micro_batches:
                # Only from the second window on the weight is known; the first fits because it is small.
                scale = 1.0 if norms else 1e-3
                accumulator.backward(strategy.model(batch).sum() * scale, len(batch) * scale)
        norms.append(accumulator.step().grad_norm)
    assert all(math.isclose(norm, 100.0, rel_tol=2e-3) for norm in norms), norms


def check_nan_on_one_rank_stops_all_and_says_where(world: World) -> None:
    model = DistributedDataParallel(TokenClassifier())
    accumulator = Accumulator(model, adamw(model))
    before = flat(model)
    _window_with_nan(model, accumulator, rank_is_bad=world.rank == 1)
    with pytest.raises(UserError, match=re.escape("update 1: the loss is nan (rank 1, micro-step 2)")):
        accumulator.step()
    assert torch.equal(flat(model), before)


def check_nan_is_skipped_on_all_ranks_alike(world: World) -> None:
    model = DistributedDataParallel(TokenClassifier())
    accumulator = Accumulator(model, adamw(model), skip_nonfinite=True)
    before = flat(model)
    _window_with_nan(model, accumulator, rank_is_bad=world.rank == 1)
    assert accumulator.step().skipped
    assert torch.equal(flat(model), before)
    _window_with_nan(model, accumulator, rank_is_bad=False)
    assert not accumulator.step().skipped
    assert not torch.equal(flat(model), before)
    assert len(set(world.gather(tuple(flat(model).tolist())))) == 1


def _window_with_nan(model: nn.Module, accumulator: Accumulator, rank_is_bad: bool) -> None:
    batches = [RaggedTokens.collate_fn([RaggedTokens()[i]]) for i in range(3)]
    with accumulator.window(batches) as micro_batches:
        for step, batch in enumerate(micro_batches, 1):
            loss_sum, weight = token_loss(model, batch)
            accumulator.backward(loss_sum * (math.nan if rank_is_bad and step == 2 else 1.0), weight)


def check_the_fp16_scaler_steps_and_skips_per_update(world: World) -> None:
    """One overflow on one rank: all ranks skip that update, the scale halves once, not once a micro-step."""
    model = DistributedDataParallel(TokenClassifier(torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    accumulator = Accumulator(model, adamw(model), scaler=scaler)
    skipped = []
    for update in range(4):
        batches = [RaggedTokens.collate_fn([RaggedTokens()[i]]) for i in range(3)]
        with accumulator.window(batches) as micro_batches:
            for step, batch in enumerate(micro_batches):
                loss_sum, weight = token_loss(model, batch)
                if update == 1 and step == 1 and world.rank == 0:
                    loss_sum.register_hook(lambda gradient: gradient * math.inf)
                accumulator.backward(loss_sum, weight)
        skipped.append(accumulator.step().skipped)
    assert skipped == [False, True, False, False]
    assert scaler.get_scale() == 2.0**13
    assert len(set(world.gather(tuple(flat(model).tolist())))) == 1


def check_no_micro_step_waits_for_the_device(world: World) -> None:
    """No operator that hands a value to the host between the first forward and the end of the last backward."""
    model = DistributedDataParallel(TokenClassifier())
    accumulator = Accumulator(model, adamw(model))
    batches = list(next(iter(WindowLoader(RaggedTokens(), global_batch_size=16, micro_batch_size=2))))
    with CollectiveCounter() as counter, accumulator.window(batches) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(*token_loss(model, batch))
    assert counter.host_syncs == 0
    accumulator.step()
    with CollectiveCounter() as counter:
        torch.ones(()).item()
    assert counter.host_syncs > 0, "the counter must be able to notice"


def check_a_bare_model_among_ranks_is_refused(world: World) -> None:
    model = TokenClassifier()
    with pytest.raises(UserError, match="bare TokenClassifier"):
        Accumulator(model, adamw(model))


def check_padded_losses_agree_whatever_the_cut(world: World) -> None:
    """In the spirit of Transformers' own test: padded text, large and small micro-batches; counts on and off."""

    def final_loss(micro_batch_size: int, counts: bool) -> float:
        def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | float]:
            loss_sum, weight = token_loss(model, batch)
            return (loss_sum, weight) if counts else (loss_sum / weight.clamp(min=1), 1.0)

        results, _ = train_tokens(
            DDPConfig(),
            rank=world.rank,
            world_size=world.world_size,
            micro_batch_size=micro_batch_size,
            loss=loss,
            dtype=torch.float32,
            clip_norm=None,
        )
        return results[-1].loss

    assert abs(final_loss(8, counts=True) - final_loss(1, counts=True)) < 1e-4
    assert abs(final_loss(8, counts=False) - final_loss(1, counts=False)) > 1e-2


def check_two_models_in_one_loop(world: World) -> None:
    """Two accumulators side by side count and scale for themselves."""
    models = [DistributedDataParallel(TokenClassifier()), DistributedDataParallel(nn.Linear(2, 1).double())]
    accumulators = [Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1)) for model in models]
    batch = RaggedTokens.collate_fn([RaggedTokens()[world.rank]])
    for _ in range(2):
        with accumulators[0].window([batch]) as micro_batches:
            for tokens in micro_batches:
                accumulators[0].backward(*token_loss(models[0], tokens))
        with accumulators[1].window([torch.ones(3, 2).double()]) as micro_batches:
            for inputs in micro_batches:
                loss = F.mse_loss(models[1](inputs), torch.zeros(3, 1).double(), reduction="sum")
                accumulators[1].backward(loss, 3)
        first, second = (accumulator.step() for accumulator in accumulators)
    assert first.sync_bytes == flat(models[0]).nbytes
    assert second.sync_bytes == flat(models[1]).nbytes
    assert second.weight == 3 * dist.get_world_size()


def check_flags_and_reports_ride_along(world: World) -> None:
    """All ranks see what any of them says, at the same update, and no collective is added for it."""
    collectives = []
    for extra in (False, True):
        model = DistributedDataParallel(TokenClassifier())
        asked = {
            "flags": {"mine": lambda: world.rank == 1, "nobody's": lambda: False},
            "reports": {"number": lambda: float(10 + world.rank)},
        }
        accumulator = Accumulator(model, adamw(model), **(asked if extra else {}))
        loader = WindowLoader(RaggedTokens(), global_batch_size=16, micro_batch_size=2)
        with CollectiveCounter() as counter:
            for window in loader:
                with accumulator.window(window) as micro_batches:
                    for batch in micro_batches:
                        accumulator.backward(*token_loss(model, batch))
                update = accumulator.step()
                if extra:
                    assert update.flags == {"mine"}
                    assert update.reports == {"number": tuple(10.0 + rank for rank in range(world.world_size))}
        collectives.append([name for name, _ in counter.collectives])
    assert collectives[0] == collectives[1]

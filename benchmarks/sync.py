"""What does one sync per update save over one sync per micro-step?

    python benchmarks/sync.py

DDP over gloo on this host, the same model and windows: seconds per update with `no_sync` on all micro-steps but the
last, and without it; rounds of the two interleaved, medians.

Then windows of a single micro-step, which has nothing to save, against a plain loop with DDP and with FSDP: the same
model, fused AdamW, clipping, and a loss that is read in each update; blocks of updates in turns, the best of each.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from distaccum import Accumulator
from distaccum.config import DDPConfig, FSDPConfig
from distaccum.runtime.world import joined_world
from distaccum.strategies import DDPStrategy, place

STEPS = (1, 2, 4, 8, 16)
WIDTH = 512


def rounds(accumulator: Accumulator, strategy: Any, steps: int, updates: int) -> dict[str, Any]:
    batches = [torch.randn(4, WIDTH) for _ in range(steps)]
    with_no_sync = DDPStrategy.no_sync
    seconds: dict[str, list[float]] = {"once": [], "every": []}
    traffic: dict[str, tuple[int, int]] = {}
    for update in range(2 * updates + 2):
        kind = ("once", "every")[update % 2]
        DDPStrategy.no_sync = with_no_sync if kind == "once" else lambda self: nullcontext()  # type: ignore[method-assign]
        started = time.perf_counter()
        with accumulator.window(batches) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(strategy.model(batch).square().sum(), len(batch))
        result = accumulator.step()
        if update >= 2:
            seconds[kind].append(time.perf_counter() - started)
            traffic[kind] = result.sync_calls, result.sync_bytes
    DDPStrategy.no_sync = with_no_sync  # type: ignore[method-assign]
    once, every = (statistics.median(seconds[kind]) for kind in ("once", "every"))
    return {
        "K": steps,
        "no_sync: ms/update": once * 1e3,
        "sync every micro-step: ms/update": every * 1e3,
        "ratio": every / once,
        "no_sync: MB/update": traffic["once"][1] / 1e6,
        "every: MB/update": traffic["every"][1] / 1e6,
    }


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def plain(strategy: str) -> Callable[[Tensor], None]:
    """Returns an update of a loop that knows nothing of windows."""
    model: nn.Module = network()
    if strategy == "ddp":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        for layer in model.children():
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
    optimizer = adamw(model)

    def update(batch: Tensor) -> None:
        loss = model(batch).square().sum() / len(batch)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=strategy != "ddp")
        loss.item()

    return update


def accumulated(strategy: str) -> Callable[[Tensor], None]:
    """Returns the same update as a window of one micro-step."""
    placed = place(network(), DDPConfig() if strategy == "ddp" else FSDPConfig(), torch.device("cpu"))
    accumulator = Accumulator(placed.model, adamw(placed.model), strategy=placed, clip_norm=1.0)

    def update(batch: Tensor) -> None:
        with accumulator.window([batch]) as micro_batches:
            for inputs in micro_batches:
                accumulator.backward(placed.model(inputs).square().sum(), weight=len(inputs))
        accumulator.step()

    return update


def single_micro_steps(strategy: str, blocks: int, updates: int = 4) -> dict[str, Any]:
    batch = torch.randn(16, WIDTH)
    ways = {"plain": plain(strategy), "distaccum": accumulated(strategy)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for block in range(blocks + 1):
        for way in list(ways)[:: 1 if block % 2 else -1]:
            started = time.perf_counter()
            for _ in range(updates):
                ways[way](batch)
            if block:
                seconds[way].append((time.perf_counter() - started) / updates)
    loop, own = (min(seconds[way]) for way in ways)
    return {
        "strategy, K = 1": strategy,
        "plain loop: ms/update": loop * 1e3,
        "distaccum: ms/update": own * 1e3,
        "distaccum / plain": own / loop,
    }


def on_a_rank(what: str, count: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    with joined_world() as world:
        world.init_process_group(torch.device("cpu"))
        if what == "single":
            for name in ("ddp", "fsdp"):
                common.progress(f"K = 1, {name}")
                common.send({"ranks": world.world_size, **single_micro_steps(name, count)})
            return
        model = network()
        strategy = place(model, DDPConfig(), torch.device("cpu"))
        accumulator = Accumulator(strategy.model, torch.optim.SGD(model.parameters(), lr=1e-4), strategy=strategy)
        for steps in STEPS:
            common.progress(f"K = {steps}")
            common.send({"ranks": world.world_size, **rounds(accumulator, strategy, steps, count)})


def main() -> None:
    if words := common.rank_words():
        on_a_rank(words[0], int(words[1]))
        return
    options = common.begin(common.arguments(__doc__, quick="15 seconds", full="1 minute"))
    found = common.show(
        "One sync per update against one per micro-step (8.4 MB of gradients, loopback)",
        common.on_ranks(2, __file__, "steps", "2" if options.quick else "20"),
    )
    found += common.show(
        "A window of one micro-step against a plain loop",
        common.on_ranks(2, __file__, "single", "1" if options.quick else "15"),
    )
    if options.write:
        common.write(__doc__, found)


if __name__ == "__main__":
    main()

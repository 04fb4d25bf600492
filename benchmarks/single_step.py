"""What does a window of one micro-step, which has no sync to save, cost over a plain loop?

    python benchmarks/single_step.py

Two ranks with gloo on this host, the same model, fused AdamW and clipping, and a loss that is read in each update: a
loop with plain DDP or FSDP against an `Accumulator` whose windows have one micro-batch each. The accumulator gives the
loss of the whole window; the plain loop reads its own rank's, or, in a third way, adds it up over the ranks too. Blocks
of updates in turns, many of them; the best block of each, as anything else on the machine makes times only longer. The
processor's time, of rank 0, is less disturbed by it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import common
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from distaccum import Accumulator
from distaccum.config import DDPConfig, FSDPConfig
from distaccum.runtime.world import joined_world
from distaccum.strategies import place

WIDTH = 512


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def plain(strategy: str, *, whole_loss: bool) -> Callable[[Tensor], None]:
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
        shown = loss.detach()
        if whole_loss:
            dist.all_reduce(shown)
        shown.item()

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
    ways = {
        "plain": plain(strategy, whole_loss=False),
        "whole loss": plain(strategy, whole_loss=True),
        "distaccum": accumulated(strategy),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    for block in range(blocks + 1):
        for way in list(ways)[:: 1 if block % 2 else -1]:
            started, computed = time.perf_counter(), time.process_time()
            for _ in range(updates):
                ways[way](batch)
            if block:
                seconds[way].append((time.perf_counter() - started) / updates)
                processor[way].append((time.process_time() - computed) / updates)
    loop, whole, own = (min(seconds[way]) for way in ways)
    return {
        "strategy": strategy,
        "plain loop: ms/update": loop * 1e3,
        "with the loss of all ranks: ms/update": whole * 1e3,
        "distaccum: ms/update": own * 1e3,
        "distaccum / plain": own / loop,
        "distaccum / with the loss": own / whole,
        "processor time / plain": min(processor["distaccum"]) / min(processor["plain"]),
    }


def on_a_rank(blocks: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    with joined_world() as world:
        world.init_process_group(torch.device("cpu"))
        for name in ("ddp", "fsdp"):
            common.progress(name)
            common.send({"ranks": world.world_size, **single_micro_steps(name, blocks)})


def main() -> None:
    if words := common.rank_words():
        on_a_rank(int(words[0]))
        return
    options = common.begin(common.arguments(__doc__, quick="10 seconds", full="1 minute"))
    rows = common.show(
        "A window of one micro-step against a plain loop (8.4 MB of gradients, loopback)",
        common.on_ranks(2, __file__, "1" if options.quick else "60"),
    )
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()

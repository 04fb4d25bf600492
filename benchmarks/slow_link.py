"""What does a slow network cost, and what do one sync per update and compression save?

Two hosts, emulated as network namespaces, with a link of 100 Mbit/s and of 1 Gbit/s between them; DDP over gloo, a
model of 2.1 MB. K micro-steps an update with a sync in every one, with `no_sync` on all but the last, and with that one
sync as bfloat16 and as PowerSGD of rank 1. Rounds of all ways are interleaved; medians.

The bytes are those that the interface of one host has sent, headers included. The prediction is that of an alpha-beta
model of the ring all-reduce, which hides nothing of the communication behind the computing:

    seconds = compute(K) + collectives · α + 2 (N − 1) / N · bytes handed to them / β

compute(K) is measured with no link: both hosts at once make the same K micro-steps and optimizer step, each for itself.
α is the time of a bare all-reduce of 4 bytes over the link, β the slope of the time of larger ones (1 to 8 MB) in their
bytes. N is 2. What compressing costs is not in it.

Needs Linux, root, and `ip` and `tc` (apt-get install iproute2).
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import common
import numpy as np
import torch
import torch.distributed as dist
from emulated_hosts import bytes_sent, start_ranks, two_hosts, why_impossible
from torch import nn

from distaccum import Accumulator, UpdateResult
from distaccum.choices import Compression
from distaccum.config import DDPConfig
from distaccum.strategies import DDPStrategy, SingleStrategy, Strategy, place

RATES = ("100mbit", "1gbit")
STEPS = (1, 2, 4, 8, 16)
EVERY, NO_SYNC, BF16, POWERSGD = "every micro-step", "no_sync", "no_sync, bf16", "no_sync, PowerSGD"
WIDTH, LAYERS = 256, 8
POWERSGD_START = 2
WARM_UP = POWERSGD_START + 2
"""Updates before any is measured: DDP lays out its buckets, PowerSGD begins to compress."""


class SyncingEvery(DDPStrategy):
    """DDP that doesn't know that the gradients of a window can wait."""

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()


class Way:
    """One way of making updates, on a copy of the model."""

    def __init__(self, model: nn.Module, strategy_of: Callable[[nn.Module], Strategy]) -> None:
        module = copy.deepcopy(model)
        self.strategy = strategy_of(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
        self.accumulator = Accumulator(self.strategy.model, optimizer, strategy=self.strategy)
        self.batch = torch.randn(4, WIDTH)

    def update(self, steps: int) -> UpdateResult:
        with self.accumulator.window([self.batch] * steps) as micro_batches:
            for batch in micro_batches:
                self.accumulator.backward(self.strategy.model(batch).square().sum(), len(batch))
        return self.accumulator.step()


def ways() -> dict[str, Way]:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
    cpu = torch.device("cpu")

    def ddp(compression: Compression) -> Callable[[nn.Module], Strategy]:
        config = DDPConfig(compression=compression, powersgd_start_update=POWERSGD_START)
        return lambda module: place(module, config, cpu)

    def syncing_every(module: nn.Module) -> Strategy:
        return SyncingEvery(nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True))

    return {
        "alone": Way(model, SingleStrategy),
        EVERY: Way(model, syncing_every),
        NO_SYNC: Way(model, ddp(Compression.none)),
        BF16: Way(model, ddp(Compression.bf16)),
        POWERSGD: Way(model, ddp(Compression.powersgd)),
    }


def fitted_link(repetitions: int) -> tuple[float, float]:
    """α in seconds per collective and β in bytes per second, from bare all-reduces."""

    def seconds(size: int) -> float:
        tensor = torch.zeros(size // 4)
        taken = []
        for _ in range(repetitions):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(tensor)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    # Not the intercept of the line: what the link's bucket lets through at once would be in it.
    alpha = seconds(4)
    sizes = [megabytes * 2**20 for megabytes in (1, 2, 4, 8)]
    per_byte, _ = np.polyfit([ring_share() * size for size in sizes], [seconds(size) for size in sizes], 1)
    return alpha, 1 / float(per_byte)


def ring_share() -> float:
    """Bytes that a rank sends in a ring all-reduce for each byte of its tensor."""
    return 2 * (dist.get_world_size() - 1) / dist.get_world_size()


def measure(all_ways: dict[str, Way], steps: int, rounds: int, updates: int) -> dict[str, dict[str, float]]:
    """Medians over rounds, by way: seconds, bytes on the wire, collectives and bytes handed to them, per update."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in all_ways}
    for _ in range(rounds):
        for name, way in all_ways.items():
            dist.barrier()
            sent, started = bytes_sent(), time.perf_counter()
            results = [way.update(steps) for _ in range(updates)]
            seconds, wire = time.perf_counter() - started, bytes_sent() - sent
            calls, handed = (sum(getattr(result, what) for result in results) for what in ("sync_calls", "sync_bytes"))
            found[name].append(tuple(value / updates for value in (seconds, wire, calls, handed)))
    names = ("seconds", "wire", "calls", "handed")
    return {
        name: dict(zip(names, map(statistics.median, zip(*rows, strict=True)), strict=True))
        for name, rows in found.items()
    }


def on_a_rank(rate: str, is_quick: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    all_ways = ways()
    for way in all_ways.values():
        for _ in range(WARM_UP):
            way.update(1)
    alpha, beta = fitted_link(3 if is_quick else 7)
    rows = []
    for steps in (1, 8) if is_quick else STEPS:
        found = measure(all_ways, steps, rounds=1 if is_quick else 5, updates=1 if is_quick else 3)
        compute = found.pop("alone")["seconds"]
        rows += [
            {
                "link": rate,
                "K": steps,
                "sync": name,
                "s/update": own["seconds"],
                "faster than every": found[EVERY]["seconds"] / own["seconds"],
                "faster than no_sync": found[NO_SYNC]["seconds"] / own["seconds"],
                "MB on the wire": own["wire"] / 1e6,
                "compute (s)": compute,
                "predicted (s)": (predicted := compute + own["calls"] * alpha + ring_share() * own["handed"] / beta),
                "predicted / measured": predicted / own["seconds"],
            }
            for name, own in found.items()
        ]
    is_main = dist.get_rank() == 0
    dist.barrier()
    dist.destroy_process_group()
    if is_main:
        print(json.dumps({"alpha_seconds": alpha, "beta_bytes_per_second": beta, "rows": rows}))


def main() -> None:
    if sys.argv[1:2] == ["rank"]:
        on_a_rank(sys.argv[2], sys.argv[3] == "quick")
        return
    options = common.arguments(__doc__ or "").parse_args()
    if reason := why_impossible():
        raise SystemExit(f"hosts can't be emulated here: {reason}")
    rows = []
    for rate in RATES:
        with two_hosts(rate) as hosts:
            extent = "quick" if options.quick else "full"
            found = json.loads(start_ranks(hosts, sys.executable, __file__, "rank", rate, extent).splitlines()[-1])
        alpha, beta = found["alpha_seconds"], found["beta_bytes_per_second"]
        print(f"{rate}: α = {alpha * 1e3:.2f} ms, β = {beta * 8 / 1e6:.1f} Mbit/s")
        rows += [{**row, "α (ms)": alpha * 1e3, "β (MB/s)": beta / 1e6} for row in found["rows"]]
    common.show("Updates of 2.1 MB of gradients over a slow link between 2 hosts", rows)
    if options.write:
        common.write("slow_link", (__doc__ or "").splitlines()[0], rows)


if __name__ == "__main__":
    main()

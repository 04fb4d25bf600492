"""What does a slow network cost, and what do one sync per update and compression save?

    python benchmarks/slow_link.py

Two hosts, emulated as network namespaces, with a link of 100 Mbit/s and of 1 Gbit/s between them; DDP over gloo, a
model of 2.1 MB. K micro-steps an update with a sync in every one, with `no_sync` on all but the last, and with that one
sync as bfloat16 and as PowerSGD of rank 1. Rounds of all ways are interleaved; medians.

The bytes are those that the interface of one host has sent, headers included. The prediction is that of
`distaccum.tools.tune.network_model`, an alpha-beta model of the ring all-reduce, as `distaccum.tune` uses it:

    seconds = compute(K) + what the all-reduces take beyond the end of the backward that they are sent in

compute(K) is measured without the link, and the line through it over K taken: both hosts at once make the same updates,
each for itself, through the same DDP with a group of one rank, so that what compressing costs is in it. α is half the
time of a bare all-reduce of 256 bytes over the link, β the slope of the time of larger ones (1 to 8 MB) in their bytes.
PowerSGD's collectives wait for each other, and for its own computing between them: they hide behind nothing.

Needs Linux, root, and `ip` and `tc` (apt-get install iproute2).
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import common
import torch
import torch.distributed as dist
from emulated_hosts import bytes_sent, on_hosts, two_hosts, why_impossible
from torch import nn

from distaccum import Accumulator, UpdateResult
from distaccum.config import DDPConfig
from distaccum.config.enums import Compression
from distaccum.strategies import DDPStrategy, Strategy
from distaccum.strategies.ddp import place_ddp
from distaccum.tools.bench.network import SIZES, time_all_reduces
from distaccum.tools.tune.network_model import Link, buckets_of, fit_compute, fit_link, update_seconds

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


def ways(group: dist.ProcessGroup | None = None) -> dict[str, Way]:
    """All ways, between the ranks of a group; None for all ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
    cpu = torch.device("cpu")

    def ddp(compression: Compression) -> Callable[[nn.Module], Strategy]:
        config = DDPConfig(compression=compression, powersgd_start_update=POWERSGD_START)
        own = group if group is None else dist.new_subgroups(group_size=1)[0]
        return lambda module: place_ddp(module, config, cpu, group=own)

    def syncing_every(module: nn.Module) -> Strategy:
        ddp = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True, process_group=group)
        return SyncingEvery(ddp)

    return {
        EVERY: Way(model, syncing_every),
        NO_SYNC: Way(model, ddp(Compression.none)),
        BF16: Way(model, ddp(Compression.bf16)),
        POWERSGD: Way(model, ddp(Compression.powersgd)),
    }


def predicted(way: str, steps: int, own: dict[str, float], computing: dict[int, float], link: Link) -> float:
    """Seconds per update, of what was measured without the link."""
    world_size = dist.get_world_size()
    compute = fit_compute(computing)
    if way == EVERY:
        # Each micro-step is an update's last one, but for the optimizer's step.
        buckets = buckets_of(own["handed"] / steps, round(own["calls"] / steps))
        alone = update_seconds(0.0, compute.micro_step_seconds, buckets, link, world_size)
        return compute.seconds(steps) + steps * alone
    seconds = compute.seconds(steps)
    buckets = buckets_of(own["handed"], round(own["calls"]))
    return update_seconds(seconds, 0.0 if way == POWERSGD else compute.micro_step_seconds, buckets, link, world_size)


def measure(all_ways: dict[str, Way], steps: int, rounds: int, updates: int) -> dict[str, dict[str, float]]:
    """Medians over rounds, by way: seconds, bytes on the wire, collectives and bytes handed to them, per update."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in all_ways}
    for _ in common.rounds(rounds, f"K = {steps}: round"):
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
    alone = {f"{name}, alone": way for name, way in ways(dist.new_subgroups(group_size=1)[0]).items()}
    for way in [*all_ways.values(), *alone.values()]:
        for _ in range(WARM_UP):
            way.update(1)
    measured = time_all_reduces(SIZES, 3 if is_quick else 15, torch.device("cpu"))
    link = fit_link(measured, dist.get_world_size())
    counts = (1, 8) if is_quick else STEPS
    found = {
        steps: measure(all_ways | alone, steps, rounds=1 if is_quick else 5, updates=1 if is_quick else 3)
        for steps in counts
    }
    for steps in counts:
        for name in all_ways:
            own = found[steps][name]
            computing = {count: found[count][f"{name}, alone"]["seconds"] for count in counts}
            expected = predicted(name, steps, own, computing, link)
            common.send(
                {
                    "link": rate,
                    "K": steps,
                    "sync": name,
                    "s/update": own["seconds"],
                    "faster than every": found[steps][EVERY]["seconds"] / own["seconds"],
                    "faster than no_sync": found[steps][NO_SYNC]["seconds"] / own["seconds"],
                    "MB on the wire": own["wire"] / 1e6,
                    "compute (s)": computing[steps],
                    "predicted (s)": expected,
                    "predicted / measured": expected / own["seconds"],
                    "α (ms)": link.latency_seconds * 1e3,
                    "β (MB/s)": link.bytes_per_second / 1e6,
                }
            )
    dist.barrier()
    dist.destroy_process_group()


def over_both_links(is_quick: bool) -> Iterator[common.Row]:
    for rate in RATES[:1] if is_quick else RATES:
        with two_hosts(rate) as hosts:
            yield from on_hosts(hosts, __file__, rate, "quick" if is_quick else "full")


def main() -> None:
    if words := common.rank_words():
        on_a_rank(words[0], words[1] == "quick")
        return
    options = common.begin(common.arguments(__doc__, quick="20 seconds", full="4 minutes"))
    if reason := why_impossible():
        raise SystemExit(f"hosts can't be emulated here: {reason}")
    rows = common.show(
        "Updates of 2.1 MB of gradients over a slow link between 2 hosts", over_both_links(options.quick)
    )
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()

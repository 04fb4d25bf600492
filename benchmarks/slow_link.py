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

The second table has two ranks on each host, and a link of 100 Mbit/s: DDP, and FSDP with the gradients of a window
added up whole on each rank, in shards, and in shards of a node (`strategy.accumulate`). The bytes are those between the
hosts. The third table has a model of 38 MB and 256 rows a micro-batch, which is nearer to what FSDP is for: gloo takes
a few milliseconds for a collective inside a host however small it is.

Needs Linux, root, and `ip` and `tc` (apt-get install iproute2).
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import common
import torch
import torch.distributed as dist
from emulated_hosts import as_ranks_of_host, bytes_sent, on_hosts, two_hosts, why_impossible
from torch import nn

from distaccum import Accumulator, UpdateResult
from distaccum.config import DDPConfig, FSDPConfig
from distaccum.config.enums import Accumulate, Compression, PrecisionName
from distaccum.strategies import DDPStrategy, Strategy
from distaccum.strategies.ddp import place_ddp
from distaccum.tools.bench.network import SIZES, time_all_reduces
from distaccum.tools.tune.network_model import Link, buckets_of, fit_compute, fit_link, update_seconds

RATES = ("100mbit", "1gbit")
STEPS = (1, 2, 4, 8, 16)
EVERY, NO_SYNC, BF16, POWERSGD = "every micro-step", "no_sync", "no_sync, bf16", "no_sync, PowerSGD"
RANKS_OF_HOST = 2
STEPS_SHARDED = (1, 4, 16)
BLOCKS = 2
"""That FSDP gathers one by one."""
DDP = "ddp, no_sync"
POWERSGD_START = 2
WARM_UP = POWERSGD_START + 2
"""Updates before any is measured: DDP lays out its buckets, PowerSGD begins to compress."""


@dataclass(frozen=True, slots=True)
class Size:
    """A model, and the rows of a micro-batch."""

    width: int
    layers: int
    rows: int

    def model(self, blocks: int = 1) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(self.width, self.width), nn.ReLU()) for _ in range(self.layers)]
        each = self.layers // blocks
        return nn.Sequential(*(nn.Sequential(*layers[first : first + each]) for first in range(0, self.layers, each)))


SMALL = Size(width=256, layers=8, rows=4)
LARGE = Size(width=768, layers=16, rows=256)


class SyncingEvery(DDPStrategy):
    """DDP that doesn't know that the gradients of a window can wait."""

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()


class Way:
    """One way of making updates, on a copy of the model."""

    def __init__(self, model: nn.Module, strategy_of: Callable[[nn.Module], Strategy], size: Size = SMALL) -> None:
        module = copy.deepcopy(model)
        self.strategy = strategy_of(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
        self.accumulator = Accumulator(self.strategy.model, optimizer, strategy=self.strategy)
        self.batch = torch.randn(size.rows, size.width)

    def update(self, steps: int) -> UpdateResult:
        with self.accumulator.window([self.batch] * steps) as micro_batches:
            for batch in micro_batches:
                self.accumulator.backward(self.strategy.model(batch).square().sum(), len(batch))
        return self.accumulator.step()


def ways(group: dist.ProcessGroup | None = None) -> dict[str, Way]:
    """All ways, between the ranks of a group; None for all ranks."""
    model, cpu = SMALL.model(), torch.device("cpu")

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


def sharded_ways(size: Size, flavours: Iterable[Accumulate]) -> dict[str, Way]:
    """DDP, and flavours of FSDP, between all ranks."""
    # Here and not above: importing FSDP takes as long as a quick run.
    from distaccum.strategies.fsdp import place_fsdp

    model, cpu = size.model(BLOCKS), torch.device("cpu")

    def fsdp(accumulate: Accumulate, *, reshard: bool = True, shard_size: int | None = None) -> Way:
        config = FSDPConfig(accumulate=accumulate, reshard_in_window=reshard, shard_size=shard_size)
        return Way(model, lambda module: place_fsdp(module, config, cpu, PrecisionName.fp32), size)

    return {
        DDP: Way(model, lambda module: place_ddp(module, DDPConfig(), cpu), size),
        **{f"fsdp, {accumulate}": fsdp(accumulate) for accumulate in flavours},
        "fsdp, node, gathered once": fsdp(Accumulate.node, reshard=False),
        # Nothing is left to send inside a host but for the last micro-step.
        "fsdp, whole in a host, gathered once": fsdp(Accumulate.whole, reshard=False, shard_size=RANKS_OF_HOST),
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
            seconds = time.perf_counter() - started
            dist.barrier()  # other ranks of the host may not be done
            wire = bytes_sent() - sent
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


def on_a_rank_of_two(size: Size, is_quick: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # What sends more over the link in each micro-step takes its time, of a large model minutes.
    all_ways = sharded_ways(size, Accumulate if size == SMALL and not is_quick else (Accumulate.node,))
    for way in all_ways.values():
        way.update(1)
    few = is_quick or size == LARGE
    for steps in (1, 4) if is_quick else STEPS_SHARDED:
        found = measure(all_ways, steps, rounds=1 if is_quick else 3, updates=1 if few else -(-4 // steps))
        for name, own in found.items():
            common.send(
                {
                    "link": RATES[0],
                    "MB of gradients": sum(parameter.nbytes for parameter in size.model().parameters()) / 1e6,
                    "K": steps,
                    "placement": name,
                    "s/update": own["seconds"],
                    "of DDP's": own["seconds"] / found[DDP]["seconds"],
                    "MB between hosts": own["wire"] / 1e6,
                    "collectives of gradients": own["calls"],
                }
            )
    dist.barrier()
    dist.destroy_process_group()


def of_two_ranks(which: str, is_quick: bool) -> Iterator[common.Row]:
    with two_hosts(RATES[0]) as hosts:
        words = RATES[0], "quick" if is_quick else "full", which
        yield from on_hosts(hosts, __file__, *words, ranks_of_host=RANKS_OF_HOST)


def over_both_links(is_quick: bool) -> Iterator[common.Row]:
    for rate in RATES[:1] if is_quick else RATES:
        with two_hosts(rate) as hosts:
            yield from on_hosts(hosts, __file__, rate, "quick" if is_quick else "full")


def main() -> None:
    if words := common.rank_words():
        is_quick = words[1] == "quick"
        if words[2:]:
            as_ranks_of_host(lambda: on_a_rank_of_two(LARGE if words[2] == "large" else SMALL, is_quick))
        else:
            on_a_rank(words[0], is_quick)
        return
    options = common.begin(common.arguments(__doc__, quick="25 seconds", full="10 minutes"))
    if reason := why_impossible():
        raise SystemExit(f"hosts can't be emulated here: {reason}")
    rows = common.show(
        "Updates of 2.1 MB of gradients over a slow link between 2 hosts", over_both_links(options.quick)
    )
    # The large one takes half a minute for a single round.
    for which, what in (("small", "the same model"), ("large", "a model of 38 MB"))[: 1 if options.quick else 2]:
        title = f"Updates of {what} over 100 Mbit/s between 2 hosts with 2 ranks each"
        rows += common.show(title, of_two_ranks(which, options.quick))
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()

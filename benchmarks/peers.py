"""How fast is an update under distaccum and its peers, and how right is it?

    python benchmarks/peers.py

The same model, data, optimizer (fused AdamW, clipping at 1) and number of updates in a hand-written loop, distaccum
(Accumulator and WindowLoader), Accelerate, Fabric, Lightning Trainer and Transformers Trainer; in one process and in
two, DDP over gloo on this host. All contenders run in the same processes, in rounds, each round in another order. A
time is the median over rounds of the median of a block of updates, and a ratio that of the ratios within the rounds.

The error is that of real updates against the one of the whole window as a single batch, in float64: for a full window
and for a ragged one of half the micro-batches, both of equal lengths, and for a full window of unequal lengths. It is
taken with plain SGD and no clipping, as both Adam and clipping hide an update of a wrong size.

Needs the extra: pip install "distaccum[bench]".
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers_contenders import (
    CONTENDERS,
    IGNORE_INDEX,
    PEERS,
    Sequences,
    TokenClassifier,
    Training,
    quieten,
    require_peers,
    targets_of,
)
from torch import Tensor, nn

HAND_WRITTEN = "hand-written loop"
MAX_LENGTH = 16
MICRO_BATCH_SIZE = 4
ACCUMULATION_STEPS = 8
SKIPPED = 3
"""Updates at the start of a block that don't count: DDP lays out its buckets, the optimizer its state."""


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """A model, and how often it is measured."""

    name: str
    vocab_size: int
    width: int
    num_layers: int
    updates: int
    rounds: int

    def model(self) -> TokenClassifier:
        torch.manual_seed(0)
        return TokenClassifier(self.vocab_size, self.width, self.num_layers)


SIZES = (
    Size("tiny", vocab_size=64, width=128, num_layers=3, updates=40, rounds=18),
    Size("small", vocab_size=256, width=384, num_layers=6, updates=10, rounds=12),
    Size("large", vocab_size=512, width=1024, num_layers=9, updates=3, rounds=30),
)


def seconds_per_update(contender: Callable[[Training], None], size: Size, ranks: int) -> float:
    """Median over a block of updates, after those that don't count."""
    ends: list[float] = []
    model = size.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    optimizer.register_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    samples = MICRO_BATCH_SIZE * ACCUMULATION_STEPS * ranks * (SKIPPED + size.updates)
    contender(
        Training(
            model=model,
            optimizer=optimizer,
            dataset=Sequences([MAX_LENGTH] * samples, MAX_LENGTH, size.vocab_size),
            micro_batch_size=MICRO_BATCH_SIZE,
            accumulation_steps=ACCUMULATION_STEPS,
            clip_norm=1.0,
        )
    )
    assert len(ends) == SKIPPED + size.updates, f"{len(ends)} updates"
    return statistics.median(end - start for start, end in zip(ends[SKIPPED - 1 :], ends[SKIPPED:], strict=False))


def timed(size: Size, ranks: int) -> list[common.Row]:
    """Returns rows of times, of interleaved rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    names = list(CONTENDERS)
    for number in common.rounds(size.rounds, f"{size.name}, {ranks} ranks: round"):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            seconds[name].append(seconds_per_update(CONTENDERS[name], size, ranks))
    return [
        {
            "model": size.name,
            "ranks": ranks,
            "contender": name,
            "ms/update": statistics.median(own) * 1e3,
            "/ hand-written": statistics.median(
                mine / base for mine, base in zip(own, seconds[HAND_WRITTEN], strict=True)
            ),
        }
        for name, own in seconds.items()
    ]


class Recorder:
    """Keeps of each update what it was made of (this rank's part) and what it did."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.updates: list[tuple[Tensor, Tensor, Tensor]] = []
        """The tokens that were seen, the parameters before, and after."""
        self._model = model
        self._before = _flat(model)
        self._seen: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, arguments: self._seen.append(arguments[0].flatten().clone()))
        optimizer.register_step_post_hook(lambda *_: self._end())

    def _end(self) -> None:
        after = _flat(self._model)
        tokens = torch.cat(self._seen)
        self.updates.append((tokens[tokens != 0], self._before, after))
        self._before = after
        self._seen.clear()


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).clone()


def errors(contender: Callable[[Training], None], size: Size, lengths: list[int]) -> list[float]:
    """Relative error of each update of an epoch against the update of its window as one batch."""
    model = size.model().double()
    oracle = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    recorder = Recorder(model, optimizer)
    dataset = Sequences(lengths, MAX_LENGTH, size.vocab_size)
    contender(
        Training(
            model=model,
            optimizer=optimizer,
            dataset=dataset,
            micro_batch_size=MICRO_BATCH_SIZE,
            accumulation_steps=ACCUMULATION_STEPS,
            clip_norm=None,
        )
    )
    seen: list[list[Tensor]] = [[tokens for tokens, _, _ in recorder.updates]]
    if dist.is_initialized():
        seen = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(seen, [tokens for tokens, _, _ in recorder.updates])
    windows = [torch.cat(parts) for parts in zip(*seen, strict=True)]
    assert sum(map(len, windows)) == sum(lengths), "each sample is in one window"
    found = []
    for tokens, (_, before, after) in zip(windows, recorder.updates, strict=True):
        nn.utils.vector_to_parameters(before, oracle.parameters())
        oracle.zero_grad()
        F.cross_entropy(oracle(tokens), targets_of(tokens, size.vocab_size), ignore_index=IGNORE_INDEX).backward()
        wanted = torch.cat([p.grad.reshape(-1) for p in oracle.parameters() if p.grad is not None])
        found.append(float((before - after - wanted).norm() / wanted.norm()))
    return found


def all_errors(contender: Callable[[Training], None], size: Size, ranks: int) -> dict[str, float]:
    """For a full window, a ragged one, and one of unequal lengths."""
    full = MICRO_BATCH_SIZE * ACCUMULATION_STEPS * ranks
    unequal = torch.randint(1, MAX_LENGTH + 1, (full,), generator=torch.Generator().manual_seed(1)).tolist()
    equal = errors(contender, size, [MAX_LENGTH] * (full + full // 2))
    (of_unequal,) = errors(contender, size, unequal)
    return {"error: full": equal[0], "ragged": equal[1], "unequal": of_unequal}


def on_a_rank(ranks: int, is_quick: bool, sizes: list[str]) -> None:
    torch.set_num_threads(1)
    quieten()
    if ranks > 1:
        dist.init_process_group("gloo")
    for size in (size for size in SIZES if size.name in sizes):
        if is_quick:
            size = dataclasses.replace(size, updates=1, rounds=1)
        for row in timed(size, ranks):
            common.send(row | all_errors(CONTENDERS[row["contender"]], size, ranks))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    if words := common.rank_words():
        on_a_rank(int(words[0]), words[1] == "quick", words[2:])
        return
    parser = common.arguments(__doc__, quick="30 seconds", full="20 minutes")
    names = [size.name for size in SIZES]
    parser.add_argument("--sizes", nargs="+", choices=names, help="these alone; all, or with --quick tiny, by default")
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    options = common.begin(parser)
    require_peers()
    sizes = options.sizes or (names[:1] if options.quick else names)
    words = ["quick" if options.quick else "full", *sizes]
    rows = common.show(
        f"Updates of {ACCUMULATION_STEPS} micro-steps of {MICRO_BATCH_SIZE} × {MAX_LENGTH} tokens",
        (row for n in options.ranks for row in common.on_ranks(n, __file__, str(n), *words, imports=PEERS)),
    )
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()

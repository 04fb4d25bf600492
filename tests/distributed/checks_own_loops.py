"""Loops as people write them, drawn at random, against the same windows in one shot of plain torch. Float64, to 1e-12.

What is drawn: accumulators over one model and the order in which things are made, schedulers, parameter groups, parts
frozen from the start or on the way, sums and the order of their names, weights, exceptions in the middle of a window.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from examples import distance, flat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distaccum import Accumulator, Checkpointer
from distaccum.runtime.world import World

PARTS = ("body", "left", "right")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1),
    "fused adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02, fused=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda _: None,
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3),
    "warm-up": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
}


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Linear(3, 4)
        self.left = nn.Linear(4, 2)
        self.right = nn.Linear(4, 1)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(inputs))
        return torch.cat([self.left(hidden), self.right(hidden)], 1)


@dataclass(frozen=True)
class Loop:
    """One loop.

    Attributes:
        windows: for each update, for each rank, the sizes of its micro-batches.
        halves: one optimizer and accumulator for all parts, or one for the body and one for the heads, in turns.
        made_first: what is made before the accumulators: "schedulers", "a checkpointer" or "nothing".
        frozen: a part that does not train, from the update `frozen_from` on.
        fails_at: the update before which its window is begun once and left by an exception, and in which micro-step.
    """

    windows: tuple[tuple[tuple[int, ...], ...], ...]
    halves: bool
    optimizer: str
    scheduler: str
    made_first: str
    has_groups: bool
    frozen: str | None
    frozen_from: int
    clip_norm: float | None
    weights: str
    fails_at: tuple[int, int] | None
    bucket_views: bool
    finds_unused: bool

    def sides(self) -> list[tuple[str, ...]]:
        return [("body",), ("left", "right")] if self.halves else [PARTS]

    def groups(self, module: nn.Module, parts: tuple[str, ...]) -> list[Any]:
        parameters = [parameter for part in parts for parameter in module.get_submodule(part).parameters()]
        if not self.has_groups:
            return parameters
        vectors = [parameter for parameter in parameters if parameter.ndim < 2]
        return [
            {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
            {"params": vectors, "lr": 0.01, "weight_decay": 0.0},
        ]

    def freeze(self, module: nn.Module, update: int) -> None:
        if self.frozen is not None and update == self.frozen_from:
            module.get_submodule(self.frozen).requires_grad_(False)

    def samples(self, update: int) -> list[Tensor]:
        """Of each rank; the last column is the weight."""
        generator = torch.Generator().manual_seed(update)
        drawn = []
        for sizes in self.windows[update]:
            samples = torch.randn(sum(sizes), 7, generator=generator, dtype=torch.float64)
            samples[:, 6] = 1.0 if self.weights == "counts" else samples[:, 6].abs()
            drawn.append(samples)
        return drawn


def _loss_sum(model: nn.Module, samples: Tensor) -> Tensor:
    errors = (model(samples[:, :3]) - samples[:, 3:6]).square().sum(1)
    return (errors * samples[:, 6]).sum()


def in_one_shot(loop: Loop) -> tuple[list[tuple[float, float, float]], Tensor]:
    """Loss, norm and a sum of each update, and the parameters at the end."""
    module = Heads()
    loop.freeze(module, 0)
    optimizers = [OPTIMIZERS[loop.optimizer](loop.groups(module, side)) for side in loop.sides()]
    schedulers = [SCHEDULERS[loop.scheduler](optimizer) for optimizer in optimizers]
    found = []
    for update in range(len(loop.windows)):
        if update:
            loop.freeze(module, update)
        optimizer, scheduler = optimizers[update % len(optimizers)], schedulers[update % len(optimizers)]
        samples = torch.cat(loop.samples(update))
        module.zero_grad()
        loss = _loss_sum(module, samples) / samples[:, 6].sum()
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, loop.clip_norm or math.inf)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        found.append((loss.item(), norm.item(), samples[:, 0].sum().item()))
    return found, flat(module)


class _LeftError(Exception):
    pass


def _micro_batches(loop: Loop, update: int, rank: int) -> list[Tensor]:
    return list(loop.samples(update)[rank].split(loop.windows[update][rank]))


def _run_window(loop: Loop, accumulator: Accumulator, model: nn.Module, update: int, world: World) -> None:
    fails_in = None
    if loop.fails_at is not None and loop.fails_at[0] == update:
        fails_in = loop.fails_at[1]
    for attempt in range(2 if fails_in is not None else 1):
        try:
            with accumulator.window(_micro_batches(loop, update, world.rank)) as micro_batches:
                for step, batch in enumerate(micro_batches):
                    if attempt == 0 and step == fails_in:
                        raise _LeftError
                    names = ["first", "number"] if (world.rank + step) % 2 else ["number", "first"]
                    values = {"first": batch[:, 0].sum(), "number": torch.ones(2, 1) * len(batch)}
                    weight = batch[:, 6].sum()
                    accumulator.backward(
                        _loss_sum(model, batch),
                        len(batch) if loop.weights == "counts" else weight,
                        sums={name: values[name] for name in names},
                    )
        except _LeftError:
            continue


def accumulated(loop: Loop, world: World) -> tuple[list[tuple[float, float, float]], Tensor]:
    module = Heads()
    loop.freeze(module, 0)
    model: nn.Module = module
    if world.world_size > 1:
        model = DistributedDataParallel(
            module, gradient_as_bucket_view=loop.bucket_views, find_unused_parameters=loop.finds_unused
        )
    optimizers = [OPTIMIZERS[loop.optimizer](loop.groups(module, side)) for side in loop.sides()]

    def make_schedulers() -> list[Any]:
        return [SCHEDULERS[loop.scheduler](optimizer) for optimizer in optimizers]

    schedulers = make_schedulers() if loop.made_first == "schedulers" else None
    if loop.made_first == "a checkpointer":
        for optimizer in optimizers:
            Checkpointer(tempfile.gettempdir(), model, optimizer)
    accumulators = [Accumulator(model, optimizer, clip_norm=loop.clip_norm) for optimizer in optimizers]
    schedulers = schedulers or make_schedulers()
    found = []
    for update in range(len(loop.windows)):
        if update:
            loop.freeze(module, update)
        accumulator, scheduler = accumulators[update % len(optimizers)], schedulers[update % len(optimizers)]
        _run_window(loop, accumulator, model, update, world)
        result = accumulator.step()
        assert result.sums["number"].tolist() == [[sum(map(sum, loop.windows[update]))]] * 2
        if scheduler is not None:
            scheduler.step()
        found.append((result.loss, result.grad_norm, result.sums["first"].item()))
    return found, flat(module)


def compare(loop: Loop, world: World, wanted: Loop | None = None) -> float:
    """Largest relative difference of losses, norms, sums and parameters."""
    numbers, parameters = accumulated(loop, world)
    wanted_numbers, wanted_parameters = in_one_shot(wanted or loop)
    differences = [distance(parameters, wanted_parameters)]
    for mine, reference in zip(zip(*numbers, strict=True), zip(*wanted_numbers, strict=True), strict=True):
        differences.append(distance(torch.tensor(mine).double(), torch.tensor(reference).double()))
    return max(differences)


@st.composite
def loops(draw: st.DrawFn, ranks: int) -> Loop:
    shares = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
    windows = draw(st.lists(st.tuples(*[shares] * ranks), min_size=3, max_size=5).map(tuple))
    frozen = draw(st.sampled_from([None, "left", "body"]))
    frozen_from = draw(st.integers(0, len(windows) - 1)) if frozen is not None else 0
    # One that leaves before the last micro-step of any rank, so that no rank is in a collective then.
    shortest = [min(len(sizes) for sizes in window) for window in windows]
    places = [(update, step) for update, most in enumerate(shortest) for step in range(most)]
    halves = draw(st.booleans())
    if halves and frozen == "body":
        frozen = None  # that optimizer would have nothing to do
    return Loop(
        windows=windows,
        halves=halves,
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        scheduler=draw(st.sampled_from(sorted(SCHEDULERS))),
        made_first=draw(st.sampled_from(["nothing", "schedulers", "a checkpointer"])),
        has_groups=draw(st.booleans()),
        frozen=frozen,
        frozen_from=frozen_from,
        clip_norm=draw(st.sampled_from([None, 0.1, 100.0])),
        weights=draw(st.sampled_from(["counts", "tensors"])),
        fails_at=draw(st.sampled_from([None, *places])),
        bucket_views=draw(st.booleans()),
        # DDP waits for the gradient of a part that is frozen after wrapping, unless it looks for what is unused.
        finds_unused=draw(st.booleans()) or (frozen is not None and frozen_from > 0),
    )


def check_loops_as_people_write_them(world: World) -> None:
    """Derandomized: all ranks must draw the same examples."""

    @settings(deadline=None, max_examples=100, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(loops(world.world_size))
    def is_exact(loop: Loop) -> None:
        # All ranks know of a failure on one, so that they go on together.
        assert max(world.gather(compare(loop, world))) < 1e-12

    is_exact()


def _plain(ranks: int) -> Loop:
    return Loop(
        windows=(((2, 3), *((4,) for _ in range(ranks - 1))), ((1, 1), *((2, 2, 1) for _ in range(ranks - 1)))),
        halves=False,
        optimizer="sgd",
        scheduler="step",
        made_first="nothing",
        has_groups=False,
        frozen=None,
        frozen_from=0,
        clip_norm=None,
        weights="tensors",
        fails_at=None,
        bucket_views=True,
        finds_unused=False,
    )


def check_the_comparison_sees_what_is_wrong(world: World) -> None:
    loop = _plain(world.world_size)
    assert compare(loop, world) < 1e-12
    for wrong in (
        replace(loop, weights="counts"),
        replace(loop, frozen="left"),
        replace(loop, clip_norm=0.1),
        replace(loop, optimizer="momentum"),
        replace(loop, has_groups=True),
        replace(loop, windows=(loop.windows[1], loop.windows[0])),
    ):
        assert compare(loop, world, wrong) > 1e-3, wrong

"""What a window adds up besides gradients: one vector a rank, and what to say when it is not a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distaccum.errors import UserError
from distaccum.loaders import Window
from distaccum.strategies import Strategy
from distaccum.updates import OpenWindow


def own_totals(
    window: OpenWindow,
    strategy: Strategy,
    flags: Mapping[str, Callable[[], bool]],
    reports: Mapping[str, Callable[[], float]],
) -> Tensor:
    """This rank's loss, weight, last norm, flags, reports and sums, in one vector of float64 on the device."""
    device = strategy.device
    weights = [value for value in window.weights if isinstance(value, Tensor)]
    if len(weights) < len(window.weights):
        numbers = math.fsum(value for value in window.weights if not isinstance(value, Tensor))
        weights.append(torch.full((), numbers, dtype=torch.float64, device=device))
    loss_sum, weight, *sums = (
        _added_up(values, device).reshape(-1) for values in (window.loss_sums, weights, *window.sums.values())
    )
    norm = torch.full((1,), window.norm_before, dtype=torch.float64, device=device)
    return torch.cat([loss_sum, weight, norm, *_own_flags(device, flags), *_own_reports(strategy, reports), *sums])


def _added_up(values: list[Tensor], device: torch.device) -> Tensor:
    """Sum of tensors of one shape, in float64 on the device."""
    if any(value.device != device for value in values):
        values = [value.to(device, non_blocking=True) for value in values]
    return torch.stack(values).sum(0, dtype=torch.float64)


def _own_flags(device: torch.device, flags: Mapping[str, Callable[[], bool]]) -> list[Tensor]:
    if not flags:
        return []
    raised = torch.zeros(len(flags), dtype=torch.float64, device=device)
    for number, ask in enumerate(flags.values()):
        if ask():
            raised[number].fill_(1.0)  # copying the answers to a GPU would make the host wait
    return [raised]


def _own_reports(strategy: Strategy, reports: Mapping[str, Callable[[], float]]) -> list[Tensor]:
    """Each report as a vector with a place for every rank, of which this one fills its own."""
    group, ranks = strategy.process_group, strategy.world_size
    rank = dist.get_rank(group) if group is not None else 0
    vectors = []
    for ask in reports.values():
        vectors.append(torch.zeros(ranks, dtype=torch.float64, device=strategy.device))
        vectors[-1][rank].fill_(ask())
    return vectors


@dataclass(frozen=True, slots=True)
class WindowTotals:
    """What a window has added up over micro-steps and ranks, on the host."""

    loss: float
    """Mean; NaN if the weight is zero."""
    weight: float
    norm_before: float
    """Of the gradient of the window before, on the average of the ranks."""
    flags: frozenset[str]
    reports: dict[str, tuple[float, ...]]
    sums: dict[str, Tensor]


def read_totals(
    numbers: Sequence[float], window: OpenWindow, flags: Iterable[str], reports: Iterable[str], ranks: int
) -> WindowTotals:
    """Reads the vector of `own_totals`, added up over the ranks.

    Args:
        flags, reports: their names, in the order of `own_totals`.
    """
    rest = iter(numbers)
    loss_sum, weight, norm_before = next(rest), next(rest), next(rest) / ranks
    return WindowTotals(
        loss=loss_sum / weight if weight else math.nan,
        weight=weight,
        norm_before=norm_before,
        flags=frozenset([name for name in flags if next(rest)]),
        reports={name: tuple(islice(rest, ranks)) for name in reports},
        sums={name: _shaped(rest, parts[0].shape) for name, parts in window.sums.items()},
    )


def _shaped(numbers: Iterator[float], shape: torch.Size) -> Tensor:
    return torch.tensor(list(islice(numbers, shape.numel())), dtype=torch.float64).reshape(shape)


def require_same_norm(update: int, window: OpenWindow, strategy: Strategy, mean: float, dtype: torch.dtype) -> None:
    """Refuses to go on if the gradient of the update before had another norm on this rank than on the average of all.

    It crosses the network with the sums of the next window, so that of a run's last update is never compared.

    Args:
        dtype: of the norms, which different devices may round differently.

    Raises:
        UserError: the norm was another one.
    """
    mine = window.norm_before
    if abs(mine - mean) > mean * max(1e-5, 4 * torch.finfo(dtype).eps):
        raise UserError(
            f"update {update}: the gradient's norm was {mine:.9g} on rank {dist.get_rank()}, {mean:.9g} on the average "
            "of the ranks, so their parameters differ since then. Look for what changes gradients after the sync, or "
            "the optimizer's parameters, on some ranks alone; and go on from a checkpoint before that update."
        )


def loss_scale(micro_batches: Iterable[Any], last_weight: float | None) -> float:
    """A power of two near 1 / (total weight), by which every loss of a window is multiplied.

    It keeps gradients of sums in the range of gradients of means, for float16 and for compressed buckets. Being a
    power of two, it changes no bit otherwise. It must be the same on all ranks, so it comes from numbers that all
    know: the total weight of the window before, or the size of the first window.
    """
    weight = last_weight
    if weight is None:
        weight = micro_batches.num_samples if isinstance(micro_batches, Window) else 1.0
    return 2.0 ** -round(math.log2(weight)) if math.isfinite(weight) and weight > 0 else 1.0


def is_lost_on_any_rank(window: OpenWindow, strategy: Strategy) -> bool:
    """Whether NaN means that a rank has run out of memory. All ranks see it, so they may ask each other."""
    is_lost = torch.tensor(float(window.is_lost), device=strategy.device)
    if strategy.process_group is not None:
        dist.all_reduce(is_lost, dist.ReduceOp.MAX, group=strategy.process_group)
    return bool(is_lost)


def explain_nonfinite(
    update: int, window: OpenWindow, strategy: Strategy, loss: float, weight: float, grad_norm: float
) -> str:
    """What to say of an update that can't be made. Every rank gets here, so it may use a collective."""
    if weight <= 0:
        what = f"the total weight of the window is {weight:g}, so there is nothing to take the mean of"
    elif not math.isfinite(loss):
        what = f"the loss is {loss}{_where_nonfinite(window, strategy)}"
    else:
        what = f"the loss is {loss:.6g}, but the norm of the gradient is {grad_norm}"
    return (
        f"update {update}: {what}. The parameters have not moved. Look at that data, lower the learning rate, or leave "
        "such updates out with train.on_nonfinite=skip."
    )


def _where_nonfinite(window: OpenWindow, strategy: Strategy) -> str:
    """Names the ranks and micro-steps whose loss went wrong."""
    flags = ~torch.stack(window.loss_sums).isfinite()
    mine = [step for step, flag in enumerate(flags.tolist(), 1) if flag]
    everyone = [mine]
    if strategy.process_group is not None:
        everyone = [[] for _ in range(strategy.world_size)]
        dist.all_gather_object(everyone, mine, group=strategy.process_group)
    found = [
        f"rank {rank}, micro-step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"
        for rank, steps in enumerate(everyone)
        if steps
    ]
    return f" ({'; '.join(found)})" if found else ""

"""Norms of the micro-steps' own gradients, taken before these are added up, and without a copy of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distaccum.accumulation.noise_scale import NoiseScale
from distaccum.accumulation.optimizer_step import Gradients
from distaccum.errors import UserError
from distaccum.loaders import Window
from distaccum.strategies import Strategy

_HELD_BYTES = 4 << 20
"""Gradients are held, over micro-steps too, until they make a batch of norms: little memory, few small operations."""


class MicroGradients:
    """Adds up the squared norms of the gradients of one window's micro-steps on this rank.

    Used as a context around the window. Hooks on the parameters see what each backward brings, before it is added to
    the gradient and before anything crosses the network; they change none of it. The host never waits in here.

    Args:
        strategy: how the model is placed.
        parameters: the optimizer's.
    """

    def __init__(self, strategy: Strategy, parameters: Sequence[Tensor]) -> None:
        self._strategy = strategy
        self._parameters = parameters
        self._handles: list[Any] = []
        self._arrived: set[int] = set()
        self._held: list[Tensor] = []
        self._held_bytes = 0
        self._squares: list[Tensor] = []
        self._sizes: list[int] = []
        self._came_twice = False
        self._vector: Tensor | None = None
        self._work: dist.Work | None = None

    def __enter__(self) -> MicroGradients:
        leaves = self._strategy.gradient_leaves(self._parameters)
        for number, leaf in enumerate(leaves):
            self._handles.append(leaf.register_hook(partial(self._see, number)))  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._held = []

    def forget(self) -> None:
        """Drops what has been seen, as the micro-steps so far are to be taken again."""
        self._held, self._held_bytes = [], 0
        self._squares.clear()
        self._sizes.clear()

    def begin(self, num_samples: int) -> None:
        """Prepares for the backward of a micro-step."""
        self._sizes.append(num_samples)
        self._arrived.clear()

    def _see(self, number: int, gradient: Tensor) -> None:
        # Twice in one backward: reentrant activation checkpointing of a shared parameter. The norm of the sum of the
        # two doesn't follow from theirs.
        self._came_twice |= number in self._arrived
        self._arrived.add(number)
        # Itself, and no view of it: as long as it is held, autograd doesn't take it for .grad and add later ones to it.
        self._held.append(gradient)
        self._held_bytes += gradient.nbytes
        if self._held_bytes >= _HELD_BYTES:
            self._take_norms()

    def _take_norms(self) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for gradient in self._held:
            kinds[gradient.device, gradient.dtype].append(gradient)
        for (_, dtype), gradients in kinds.items():
            # In float32 at least: rounded to bfloat16, norms would be off by more than what is to be measured.
            norms = torch._foreach_norm(gradients, 2, dtype=torch.promote_types(dtype, torch.float32))
            self._squares.append(torch.stack(norms).double().square().sum().to(self._strategy.device))
        self._held, self._held_bytes = [], 0

    def start(self, scale: float = 1.0, scaler: torch.amp.GradScaler | None = None) -> None:
        """Begins to add up over all ranks, after the window's last backward and beside what follows. All ranks call it.

        Args:
            scale, scaler: what the losses have been multiplied by.
        """
        self._take_norms()
        sizes = [float(size) for size in self._sizes if size]
        square = torch.stack(self._squares).sum() if self._squares else torch.zeros((), dtype=torch.float64)
        factor = torch.full((), scale, dtype=torch.float64, device=self._strategy.device)
        unscale = 1 / (factor if scaler is None else scaler.scale(factor))
        square = square.to(self._strategy.device) * unscale * unscale
        if self._came_twice:
            square = square * torch.nan
        counts = (float(len(sizes)), sum(sizes), sum(size * size for size in sizes))
        # full_like, as copying numbers to a GPU would make the host wait.
        self._vector = torch.stack([square, *(torch.full_like(square, count) for count in counts)])
        if self._strategy.process_group is not None:
            self._work = dist.all_reduce(self._vector, group=self._strategy.process_group, async_op=True)

    def seen(self) -> Tensor:
        """Returns the attributes of a `Measurement` but `whole`, over all ranks: float64 `[4]`, on the device."""
        assert self._vector is not None, "start comes first"
        if self._work is not None:
            self._work.wait()
        return self._vector


def watcher_of(
    micro_batches: Iterable[Any], updates: int, noise_scale: NoiseScale | None, gradients: Gradients
) -> MicroGradients | None:
    """The `MicroGradients` of a window; None if the window is not to be measured.

    Args:
        updates: number of windows before it, for those that don't know their own number.

    Raises:
        UserError: its micro-batches were put together by length.
    """
    if noise_scale is None:
        return None
    number = updates
    if isinstance(micro_batches, Window):
        number = micro_batches.number
        if micro_batches.is_by_length:
            raise UserError(
                "the noise scale can't be measured in micro-batches that were put together by length: they are not "
                "random samples. Set batch=uniform, or leave insight.noise_scale out."
            )
    return MicroGradients(gradients.strategy, gradients.of_optimizer()) if noise_scale.is_due(number) else None

"""Norms of the gradient, and updates relative to the weights, block by block (`insight.layers=true`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distaccum.accumulation import Accumulator
from distaccum.strategies import local_parts
from distaccum.strategies.blocks import blocks_of

REST = "(rest)"
"""Name of what is in no block."""


def blocks_by_parameter(module: nn.Module, names: Sequence[str] = ()) -> dict[str, str]:
    """Returns the block of each parameter, both by their names, in the order of the model.

    Blocks are those that FSDP shards; of a model that is a single one, what is inside. Called before the model is
    placed, as sharding renames classes.

    Args:
        names: classes of blocks, as `blocks_of` takes them.
    """
    parts = blocks_of(module, names)
    while len(parts) == 1 and not names and (inside := blocks_of(parts[0])):
        parts = inside
    blocks = {id(block) for block in parts}
    found: dict[str, str] = {}
    for path, part in module.named_modules():
        if id(part) in blocks:
            for name, _ in part.named_parameters(prefix=path):
                found.setdefault(name, path)
    return {name: found.get(name, REST) for name, _ in module.named_parameters()}


class LayerNorms:
    """Measures each block of a model in every n-th update: ‖g‖ of the mean gradient, and ‖Δw‖ / ‖w‖ of the step.

    The gradient is the window's over all ranks, before clipping; Δw is the whole step with weight decay and all, w the
    weights before it. Both are over those parameters of a block that have a gradient. A measured update takes a copy of
    the weights for its duration, and one more wait for the device; all others take neither.

    Args:
        blocks: the name of each parameter's block, by the parameter's name.
        every_updates: updates from one measurement to the next.
    """

    def __init__(self, accumulator: Accumulator, blocks: Mapping[str, str], every_updates: int) -> None:
        self._accumulator = accumulator
        self._blocks = blocks
        self._names = list(dict.fromkeys(blocks.values()))
        self._every = every_updates
        self._before: dict[str, Tensor] = {}
        self._squares: Tensor | None = None
        self._measured: list[str] = []

    def begin(self, update: int) -> None:
        """Prepares for an update (from 1), which is measured if its number is a multiple of n."""
        is_due = update % self._every == 0
        self._squares, self._measured = None, []
        self._accumulator.on_gradients = self._see if is_due else None
        named = self._accumulator.strategy.module.named_parameters() if is_due else ()
        kept = {name: parameter.detach() for name, parameter in named if parameter.requires_grad}
        copies = [part.clone() for part in local_parts(list(kept.values()))]
        self._before = dict(zip(kept, copies, strict=True))

    def _see(self, gradients: Mapping[str, Tensor]) -> None:
        if self._measured:  # an optimizer that evaluates the loss itself: the first gradient is that of the update
            return
        self._measured = [name for name in gradients if name in self._before]
        self._squares = self._added_up(local_parts([gradients[name] for name in self._measured]))

    def end(self) -> dict[str, dict[str, float]] | None:
        """Returns `grad_norm` and `update_ratio` of each block; None if the update was not measured, or skipped.

        All ranks call it after the update.
        """
        before, self._before = self._before, {}
        if self._squares is None:
            return None
        named = dict(self._accumulator.strategy.module.named_parameters())
        weights = [before[name] for name in self._measured]
        now = [named[name].detach() for name in self._measured]
        # In float32 at least: a difference in bfloat16 would be rounded by more than what is to be measured.
        steps = [_wide(part) - _wide(weight) for part, weight in zip(local_parts(now), weights, strict=True)]
        squares = torch.stack([self._squares, self._added_up(weights), self._added_up(steps)])
        squares = self._accumulator.strategy.sum_over_shards(squares.to(self._accumulator.strategy.device))
        counted = {self._blocks.get(name, REST) for name in self._measured}
        found = zip(self._names, *squares.sqrt().tolist(), strict=True)
        return {
            block: {"grad_norm": gradient, "update_ratio": step / weight if weight else float("nan")}
            for block, gradient, weight, step in found
            if block in counted
        }

    def _added_up(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns the sum of squares of each block: float64, on the device."""
        norms = torch._foreach_norm([_wide(part) for part in parts])
        places = [self._names.index(self._blocks.get(name, REST)) for name in self._measured]
        device = norms[0].device
        sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        squares = torch.stack([norm.double() for norm in norms]).square()
        return sums.index_add_(0, torch.tensor(places).to(device, non_blocking=True), squares)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

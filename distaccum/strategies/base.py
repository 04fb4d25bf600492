"""The interface between the accumulator and a placed model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from distaccum.errors import UserError, listed
from distaccum.planning.batch_plan import ONE_SYNC
from distaccum.runtime.sharded import is_sharded
from distaccum.strategies.placeholders import with_zero_gradients
from distaccum.strategies.scalar_sync import summed_beside


class Traffic:
    """Counts the collectives with gradients on this rank.

    Args:
        mark: returns a mark of the device's `Stopwatch`.

    Attributes:
        calls: number of collectives.
        bytes: bytes of the tensors handed to them.
        by_axis: the same two numbers by axis of the ranks: `shard`, between the ranks that share parameters, and
            `replicate`, between those that hold the same. Empty where there is one axis.
        last_launch: mark of the launch of the latest one, or None.
    """

    def __init__(self, mark: Callable[[], Any] = lambda: None) -> None:
        self.calls = 0
        self.bytes = 0
        self.by_axis: dict[str, tuple[int, int]] = {}
        self.last_launch: Any = None
        self._mark = mark

    def count(self, tensor: Tensor, axis: str | None = None) -> None:
        """Counts a collective that is about to be launched."""
        self.calls += 1
        self.bytes += tensor.nbytes
        if axis is not None:
            calls, size = self.by_axis.get(axis, (0, 0))
            self.by_axis[axis] = calls + 1, size + tensor.nbytes
        self.last_launch = self._mark()


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns this rank's shards of sharded tensors, and other tensors as they are. They share memory."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def refuse_unsynced(strategy: Strategy, calls_before: int, lost: Sequence[Tensor]) -> None:
    """Raises what `Strategy.require_sync` does, given the parameters that are not synchronised."""
    if strategy.world_size == 1:
        return
    kind = type(strategy.model).__name__
    if strategy.traffic.calls == calls_before:
        raise UserError(
            "no gradient of this window has crossed the network, so each rank would train a model of its own: the "
            f"window's last micro-step must call the {kind} itself, not the module inside it."
        )
    if lost:
        names = {id(parameter): name for name, parameter in strategy.module.named_parameters()}
        what = [names.get(id(entry), f"one outside the model, of shape {list(entry.shape)}") for entry in lost]
        raise UserError(
            f"parameters whose gradients never cross the network would differ between ranks: {listed(what)}. All that "
            f"the optimizer steps must be in the {kind} (those of a loss too), and require a gradient when it is made: "
            "unfreeze them before, or call strategy.rebuild() afterwards (accumulator.strategy is the strategy)."
        )


class Strategy(Protocol):
    """A placed model, as the accumulator uses it.

    A new strategy is a subclass that sets the attributes below and overrides what differs from one device in one
    process, for which the defaults hold. Among several ranks that is:

    - `no_sync` and `sync_divisor`, which say how gradients are kept on the rank and added up, and `require_sync`, which
      refuses a window whose gradients were not; all collectives with gradients are counted in `traffic`;
    - `placeholder_loss`, if its backward holds collectives of its own, and `total_norm`, if ranks hold parts of the
      gradients;
    - `can_recover` and the four methods after it, to go on when memory runs out.

    It is chosen in `distaccum.strategies.place` by its configuration class, which is in `distaccum.config.placement`
    (and, for the command line, in a file in conf/strategy). There is no registry.

    Attributes:
        model: the module to call in a micro-step.
        module: the user's own module inside it, for evaluations and checkpoints.
        device: where this rank's parameters are.
        world_size: number of ranks whose gradients are added up in the sync.
        process_group: the group of those ranks, or None when there is only this one.
        traffic: counts of the collectives with gradients.
        equal_micro_steps: True if micro-steps hold collectives of their own, so that all ranks must take equally many.
        gradients_stay: True if gradients are views of buckets that outlive a window (DDP's), so that they are not
            dropped.
        shares_buffers: True if rank 0's buffers replace the other ranks' at the start of each window.
        in_shards: True if a rank keeps only its shards of gradients, between micro-steps too.
        syncs: how often gradients are synchronised, in words.
    """

    model: nn.Module
    module: nn.Module
    device: torch.device
    world_size: int = 1
    process_group: dist.ProcessGroup | None = None
    traffic: Traffic
    equal_micro_steps: bool = False
    gradients_stay: bool = False
    shares_buffers: bool = True
    in_shards: bool = False
    syncs: str = ONE_SYNC

    @property
    def sync_divisor(self) -> int:
        """The number that the sync divides the ranks' sum by: the number of ranks where it takes the mean, else 1."""
        return 1

    def no_sync(self) -> AbstractContextManager[None]:
        """Encloses forward *and* backward of a micro-step that does not synchronise: gradients stay on the rank.

        `Accumulator._sync_context` decides which micro-steps are inside: all of a window but the last.
        """
        return nullcontext()

    def summed(self, numbers: Tensor) -> Callable[[], Tensor]:
        """Starts to add up a vector of float64 over the ranks, beside or within the backward that follows.

        Returns:
            A function that waits for the sum and returns it, to be called after that backward.
        """
        return summed_beside(numbers, self.process_group)

    def finish_sync(self) -> None:
        """Does what is left of the sync after the window's last backward."""
        return

    def require_sync(self, calls_before: int, parameters: Sequence[Tensor]) -> None:
        """Refuses a window that has not been synchronised as a whole, before its sums are waited for.

        Args:
            calls_before: `traffic.calls` at the window's start.
            parameters: those of the optimizer that have a gradient for the first time.

        Raises:
            UserError: it has not been, on this rank at least.
        """
        return

    def placeholder_loss(self, loss_sum: Tensor) -> Tensor:
        """Replaces the loss of a micro-step of weight zero: gradients are zero, and all collectives take place."""
        return with_zero_gradients(loss_sum)

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Returns the norm of all gradients together, the same on every rank: a scalar on the device."""
        return get_total_norm(gradients)

    def group_norms(self, groups: Sequence[list[Tensor]]) -> Tensor:
        """Returns the norm of each of several groups of gradients, some of them empty: a vector on the device."""
        none = torch.zeros((), device=self.device)
        return torch.stack([self.total_norm(group) if group else none for group in groups])

    def sum_over_shards(self, numbers: Tensor) -> Tensor:
        """Adds up, in place, what ranks have computed of their own shards of the parameters: all of them, and once."""
        return numbers

    def gradient_leaves(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the tensors whose hooks see this rank's own gradients of a micro-step, before the sync.

        Called by all ranks alike, between windows.

        Args:
            parameters: the optimizer's, to which the gradients belong.

        Raises:
            UserError: those gradients and the reduced ones can't be compared.
        """
        return [parameter for parameter in parameters if parameter.requires_grad]

    def drop_gradients(self) -> None:
        """Drops the gradients that the strategy keeps beside `.grad`, of a window that was left in the middle."""
        return

    def own_clock(self) -> Callable[[], float] | None:
        """Measures this rank's own time where micro-steps hold collectives, in which ranks wait for each other.

        Returns:
            A function that returns the seconds of computing since its last call, to be called once the host has waited
            for the device; None where the micro-steps' own time is that time.

        Raises:
            UserError: it can't be measured.
        """
        return None

    def share_buffers(self) -> None:
        """Makes buffers (BatchNorm statistics) the same on all ranks, if the strategy keeps them the same at all."""
        return

    def at_rest(self) -> None:
        """Brings parameters into the form that optimizer and checkpoints see. Called between windows."""
        return

    def rebuild(self) -> None:
        """Follows a change of parameters' `requires_grad`: what is unfrozen takes part in the sync from now on.

        Called by all ranks alike, between windows, after the change. Under FSDP call `at_rest()` before the change.

        Raises:
            UserError: the strategy can't.
        """
        return

    def warm_up(self, forward: Callable[[], Tensor]) -> None:
        """Settles what a strategy learns in the run's first backward, so that a resumed run computes the same bits.

        Args:
            forward: returns the loss of a real micro-batch; called only if it is needed.
        """
        return

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns the strategy's own state on this rank, which later windows depend on."""
        return {}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_tensors` returned on the same rank of as many."""
        return

    # Taking micro-steps again after one has run out of memory, without the other ranks' help. For that all forwards of
    # a window are inside `no_sync`, the last one too, and what ranks exchange is started apart from them: so a forward
    # that fails has changed nothing that the other ranks wait for.

    @property
    def can_recover(self) -> bool:
        """Whether micro-steps can be taken again: not if they hold collectives."""
        return False

    def begin_window(self) -> None:
        """Exchanges what ranks share at a window's start (buffers), so that no forward does. All ranks call it."""
        return

    def last_gradient(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """Returns a zero to be added to the window's last loss; called before that loss's forward.

        Its backward runs after all others and completes one more gradient. So the sync is still open whatever fails in
        the backward, and `complete_sync` can end it.

        Args:
            parameters: the optimizer's, of whose gradients the ranks see the norm.
        """
        return None

    def begin_sync(self, loss_sum: Tensor) -> None:
        """Makes the backward of this loss, which follows, synchronise the gradients."""
        return

    def complete_sync(self) -> None:
        """Ends a sync whose backward has failed. Missing gradients are NaN, which all ranks then see."""
        return

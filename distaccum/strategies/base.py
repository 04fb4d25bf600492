"""What the accumulator needs of a model that has been placed on devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from distaccum.errors import UserError, listed
from distaccum.strategies.placeholders import with_zero_gradients
from distaccum.strategies.scalar_sync import summed_beside


class Traffic:
    """Counts the collectives that carry gradients, on this rank.

    Attributes:
        calls: number of collectives.
        bytes: bytes of the tensors handed to them.
        last_launch: mark of the stopwatch at the launch of the latest one, or None.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.bytes = 0
        self.last_launch: Any = None

    def count(self, tensor: Tensor) -> None:
        self.calls += 1
        self.bytes += tensor.nbytes


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's shards of sharded tensors; other tensors as they are. Shares memory with them."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


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
            "unfreeze them before, or wrap the module anew."
        )


class Strategy(Protocol):
    """A placed model. Few methods, and no registry: a strategy is chosen in `distaccum.strategies.place`.

    What is here holds for one device in one process.

    Attributes:
        model: what to call in a micro-step.
        module: the user's own module inside it, for evaluations and checkpoints.
        device: where this rank's parameters are.
        world_size: number of ranks whose gradients are added up in the sync.
        process_group: the group of those ranks, or None when there is only this one.
        traffic: the collectives that carried gradients so far.
        equal_micro_steps: True if micro-steps hold collectives of their own, so that all ranks must take equally many.
        gradients_stay: True if gradients have a home between windows (DDP's buckets), so that they are not dropped.
        shares_buffers: True if rank 0's buffers replace the other ranks' at the start of each window.
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

    @property
    def sync_divisor(self) -> int:
        """What the sync divides the ranks' sum by: the number of ranks where it takes the mean, else 1."""
        return 1

    def no_sync(self) -> AbstractContextManager[None]:
        """Encloses forward *and* backward of a micro-step that is not the window's last: gradients stay on the rank."""
        return nullcontext()

    def summed(self, numbers: Tensor) -> Callable[[], Tensor]:
        """Starts to add up a vector of float64 over the ranks, beside or within the backward that follows.

        Returns:
            What waits for the sum and gives it, to be called after that backward.
        """
        return summed_beside(numbers, self.process_group)

    def require_sync(self, calls_before: int, parameters: Sequence[Tensor]) -> None:
        """Refuses a window that has not been synchronised as a whole; before anybody waits for its sums.

        Args:
            calls_before: of the traffic, at the window's start.
            parameters: of the optimizer, that have a gradient for the first time.

        Raises:
            UserError: it is one, on this rank at least.
        """
        return

    def placeholder_loss(self, loss_sum: Tensor) -> Tensor:
        """In place of the loss of a micro-step of weight zero: gradients of zero, and all the collectives."""
        return with_zero_gradients(loss_sum)

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm of all gradients together, the same on every rank; a scalar on the device."""
        return get_total_norm(gradients)

    def gradient_leaves(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors to which this rank's own gradients of a micro-step come, before they cross the network.

        Called by all ranks alike, between windows.

        Args:
            parameters: of the optimizer, to which the gradients belong.

        Raises:
            UserError: those gradients and the reduced ones can't be compared.
        """
        return [parameter for parameter in parameters if parameter.requires_grad]

    def drop_gradients(self) -> None:
        """Drops gradients of a window that was left in the middle, wherever the strategy keeps them beside `.grad`."""
        return

    def own_clock(self) -> Callable[[], float] | None:
        """How to tell this rank's own time where micro-steps hold collectives, in which ranks wait for each other.

        Returns:
            What gives the seconds of computing since it was called last, to be asked once the host has waited for the
            device; None where the micro-steps' own time tells.

        Raises:
            UserError: it can't be told.
        """
        return None

    def share_buffers(self) -> None:
        """Makes buffers (BatchNorm statistics) the same on all ranks, if the strategy keeps them the same at all."""
        return

    def at_rest(self) -> None:
        """Leaves parameters as the optimizer and checkpoints see them; to be called between windows."""
        return

    def warm_up(self, forward: Callable[[], Tensor]) -> None:
        """Settles what a strategy learns in the run's first backward, so that a resumed run computes the same bits.

        Args:
            forward: a forward of a real micro-batch, which gives a loss; called only if it is needed.
        """
        return

    def state_tensors(self) -> dict[str, Tensor]:
        """What the strategy remembers of the windows before, on this rank."""
        return {}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state_tensors` gave on the same rank of as many."""
        return


class Recoverable(Strategy, Protocol):
    """A strategy that can take micro-steps again after one has run out of memory, without the other ranks' help.

    For that all forwards of a window are inside `no_sync`, the last one too, and what ranks exchange is started apart
    from them: a forward that fails has then changed nothing that the other ranks wait for.
    """

    def begin_window(self) -> None:
        """Exchanges what ranks share at a window's start (buffers), so that no forward does. All ranks call it."""
        ...

    def last_gradient(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """A zero to be added to the window's last loss; asked for before that loss's forward.

        Its backward runs after all others and completes one more gradient. So the sync is still open whatever fails in
        the backward, and `complete_sync` can tell the other ranks.

        Args:
            parameters: the optimizer's, of whose gradients the ranks see the norm.
        """
        ...

    def begin_sync(self, loss_sum: Tensor) -> None:
        """Has the backward of this loss, which follows, synchronise the gradients."""
        ...

    def complete_sync(self) -> None:
        """Ends a sync whose backward has failed. What was missing is NaN, which all ranks then see."""
        ...


def can_recover(strategy: Strategy) -> TypeGuard[Recoverable]:
    """Whether a strategy is `Recoverable`: not if its micro-steps hold collectives."""
    return hasattr(strategy, "complete_sync") and not strategy.equal_micro_steps

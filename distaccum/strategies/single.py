"""One process, one device: nothing to synchronise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from distaccum.strategies.base import Traffic
from distaccum.strategies.placeholders import with_zero_gradients


class SingleStrategy:
    """A model on one device, or on devices of its own choice, in one process."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.module = model
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.world_size = 1
        self.sync_divisor = 1
        self.process_group = None
        self.traffic = Traffic()
        self.equal_micro_steps = False
        self.gradients_stay = False
        self.shares_buffers = True

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def summed(self, numbers: Tensor) -> Callable[[], Tensor]:
        return lambda: numbers

    def require_sync(self, calls_before: int, parameters: Sequence[Tensor]) -> None:
        pass

    def placeholder_loss(self, loss_sum: Tensor) -> Tensor:
        return with_zero_gradients(loss_sum)

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        return get_total_norm(gradients)

    def gradient_leaves(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        return [parameter for parameter in parameters if parameter.requires_grad]

    def drop_gradients(self) -> None:
        pass

    def own_clock(self) -> Callable[[], float] | None:
        return None

    def share_buffers(self) -> None:
        pass

    def at_rest(self) -> None:
        pass

    def warm_up(self, forward: Callable[[], Tensor]) -> None:
        pass

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        pass

    def begin_window(self) -> None:
        pass

    def last_gradient(self, parameters: Sequence[Tensor]) -> Tensor | None:
        return None

    def begin_sync(self, loss_sum: Tensor) -> None:
        pass

    def complete_sync(self) -> None:
        pass

"""Averages the weights over updates with torch's `AveragedModel`, for any strategy."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from distaccum.checkpoints import persistent_buffers
from distaccum.config import EmaConfig, SwaConfig
from distaccum.strategies import Strategy, local_parts

logger = logging.getLogger(__name__)


class WeightAverage:
    """An average of a placed model's weights over its updates.

    Trained parameters are averaged, and the buffers that are numbers and part of the model (BatchNorm's statistics), as
    with `AveragedModel(…, use_buffers=True)`. Each rank averages the parts that it holds, so under FSDP the average is
    sharded too. Formats narrower than float32 are averaged in float32, where small steps are not rounded away.

    Args:
        strategy: of the placed model.
        config: which average, from which update on, and how often.

    Attributes:
        name: `ema` or `swa`.
        config: as given.
    """

    def __init__(self, strategy: Strategy, config: EmaConfig | SwaConfig) -> None:
        self.name = "ema" if isinstance(config, EmaConfig) else "swa"
        self.config = config
        self._strategy = strategy
        strategy.at_rest()
        module = strategy.module
        self._parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._buffers = {
            name: module.get_submodule(name.rpartition(".")[0])
            for name, buffer in persistent_buffers(module)
            if buffer.is_floating_point()
        }
        """Whose buffers they are: a forward may put another tensor in the place of one."""
        if isinstance(config, EmaConfig):
            assert config.decay is not None
            average_of = get_ema_multi_avg_fn(config.decay)  # type: ignore[no-untyped-call]
        else:
            average_of = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        self._averaged = AveragedModel(self._weights(), multi_avg_fn=average_of)

    @property
    def _live(self) -> dict[str, Tensor]:
        buffers = {name: part.get_buffer(name.rpartition(".")[2]) for name, part in self._buffers.items()}
        return {**self._parameters, **buffers}

    def _weights(self) -> nn.ParameterList:
        """This rank's parts of the weights, in the format they are averaged in. No copies of those that have it."""
        wide = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in self._live_parts())
        return nn.ParameterList([nn.Parameter(part, requires_grad=False) for part in wide])

    def _live_parts(self) -> list[Tensor]:
        # Looked up anew each time, as FSDP may move a shard at its first forward.
        return local_parts([value.detach() for value in self._live.values()])

    def _averaged_parts(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._averaged.module.parameters()]

    def after_update(self, number: int) -> None:
        """Takes the weights as update `number` (from 1) has left them, if it is one of those that count.

        Never makes the host wait for the device.
        """
        assert self.config.first_update is not None
        since = number - self.config.first_update
        if since >= 0 and since % self.config.every_updates == 0:
            self._strategy.at_rest()
            self._averaged.update_parameters(self._weights())

    def goes_on_from(self, update: int) -> None:
        """Begins anew if the restored average holds updates that no longer count.

        To be called once its state is that of a checkpoint after `update`.
        """
        assert self.config.first_update is not None
        if self.has_begun and self.config.first_update > update:
            self._averaged.n_averaged.zero_()
            logger.info(
                "train.%s.first_update=%d is later than the checkpoint, so the average begins anew there",
                self.name,
                self.config.first_update,
            )

    @property
    def has_begun(self) -> bool:
        """Whether there are weights in it."""
        return bool(self._averaged.n_averaged)

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Puts the average into the model for a while; afterwards its own weights are back, bit for bit."""
        self._strategy.at_rest()
        # What has changed places, with a copy where the average keeps its own; memory may run out on the way.
        changed: list[tuple[Tensor, Tensor, Tensor | None]] = []
        try:
            for own, average in zip(self._live_parts(), self._averaged_parts(), strict=True):
                copy = own.clone() if own.dtype != average.dtype else None
                _exchange(own, average)
                changed.append((own, average, copy))
            yield
        finally:
            self._strategy.at_rest()
            for own, average, copy in changed:
                if copy is None:
                    _exchange(own, average)
                else:
                    own.copy_(copy)

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the average for a checkpoint: live tensors by the names of the model's own, and `n_averaged`."""
        found = {}
        for (name, live), part in zip(self._live.items(), self._averaged_parts(), strict=True):
            if isinstance(live, DTensor):
                layout, shape, stride = live.placements, live.shape, live.stride()
                part = DTensor.from_local(part, live.device_mesh, layout, run_check=False, shape=shape, stride=stride)
            found[name] = part
        return found | {"n_averaged": self._averaged.n_averaged}


def _exchange(own: Tensor, average: Tensor) -> None:
    """Puts the average in the place of a weight, and the weight in its, unless that is of another format."""
    if own.dtype != average.dtype:
        own.copy_(average)
        return
    before = own.clone()
    own.copy_(average)
    average.copy_(before)

"""A loss that takes longer on one rank, as an older GPU would: in proportion to the tokens it computes."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from distaccum.models import GPT
from distaccum.tasks import LanguageModeling, TaskOutput

SECONDS_PER_TOKEN = 6e-5
TIMES_SLOWER = 3


class SlowOnRank1(LanguageModeling):
    """Each token takes so long that what the rank computes besides hardly counts."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        slowness = TIMES_SLOWER if os.environ.get("RANK") == "1" else 1
        time.sleep(SECONDS_PER_TOKEN * slowness * batch[0].numel() if model.training else 0.0)
        return super().__call__(model, batch)


class SlowBlocksOnRank1(GPT):
    """The same in the blocks' own forwards, twice as long: what FSDP does besides is more."""

    def __init__(self, vocab_size: int, max_length: int, **options: Any) -> None:
        super().__init__(vocab_size=vocab_size, max_length=max_length, **options)
        for block in self.blocks:
            block.forward = functools.partial(_slowed, block, block.forward)


def _slowed(block: nn.Module, forward: Callable[..., Tensor], stream: Tensor, *more: Any) -> Tensor:
    slowness = TIMES_SLOWER if os.environ.get("RANK") == "1" else 1
    time.sleep(SECONDS_PER_TOKEN * slowness * stream.shape[:2].numel() if block.training else 0.0)
    return forward(stream, *more)

"""A loss that takes longer on one rank, as an older GPU would: in proportion to the tokens it computes."""

from __future__ import annotations

import os
import time
from typing import Any

from torch import nn

from distaccum.tasks import LanguageModeling, TaskOutput

SECONDS_PER_TOKEN = 2e-5
TIMES_SLOWER = 3


class SlowOnRank1(LanguageModeling):
    """Each token takes so long that what the rank computes besides hardly counts."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        slowness = TIMES_SLOWER if os.environ.get("RANK") == "1" else 1
        time.sleep(SECONDS_PER_TOKEN * slowness * batch[0].numel() if model.training else 0.0)
        return super().__call__(model, batch)

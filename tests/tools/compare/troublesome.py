"""A model that goes wrong in its own ways when it is trained by several ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from torch import Tensor, nn


class Troublesome(nn.Module):
    """On rank 1 of several: hangs on micro-batches of 4, is killed on those of 2, and raises on those of 1."""

    def __init__(self, notes: str) -> None:
        super().__init__()
        self.notes = Path(notes)
        self.linear = nn.Linear(4, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        if os.environ.get("RANK") == "1":
            match len(inputs):
                case 4:
                    (self.notes / "hangs").write_text(str(os.getpid()))
                    time.sleep(3600)
                case 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                case 1:
                    raise ZeroDivisionError("one sample is too few")
        return self.linear(inputs.flatten(1))

"""A model and data of which everything is random that can be, and troubles that befall a run at places it passes.

The environment variable `TROUBLES` holds a list of them in JSON: a run and its continuation have the same
configuration, whatever happens to one of them.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import Counter
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distaccum import Observer
from distaccum.observers import UpdateRecord

CLASSES = 4
FEATURES = 8

_passes: Counter[str] = Counter()


def trouble(place: str, do: str, *, nth: int = 1, rank: int | None = 0, **more: Any) -> dict[str, Any]:
    """What is to happen when a rank passes a place for the nth time; rank None: on all of them.

    Args:
        place: `forward`, `forward of an evaluation`, `building` (of the model), `sample 37`.
        do: name of a signal; `agent SIGTERM` for one to the parent process; `nan`, `inf`, `raise`, `sleep`,
            `touch`, `wait`, `clock`, `kill worker`, `draw`, `move buffer`.
    """
    return {"place": place, "do": do, "nth": nth, "rank": rank, **more}


def passing(place: str) -> set[str]:
    """Lets happen what is to happen here; returns what the caller has to do itself."""
    _passes[place] += 1
    left = set()
    rank = int(os.environ.get("RANK", "0"))
    for entry in json.loads(os.environ.get("TROUBLES", "[]")):
        if entry["place"] != place or entry["rank"] not in (None, rank):
            continue
        if entry["nth"] == _passes[place]:
            left |= _happen(entry)
    return left


def _happen(entry: dict[str, Any]) -> set[str]:
    match entry["do"].split():
        case ["raise"]:
            raise RuntimeError(entry.get("message", "broken on purpose"))
        case ["draw"]:
            torch.rand(())
        case ["sleep"]:
            time.sleep(entry["seconds"])
        case ["touch"]:
            Path(entry["path"]).touch()
        case ["clock"]:
            Path(entry["path"]).write_text(f"{entry['offset']}\n")  # libfaketime reads it
        case ["wait"]:
            # Until somebody removes the file.
            Path(entry["path"]).touch()
            while Path(entry["path"]).exists():
                time.sleep(0.01)
        case ["kill", "worker"]:
            # Those of the training data are started first.
            os.kill(min(child.pid or 0 for child in active_children()), signal.SIGKILL)
        case ["agent", name]:
            os.kill(os.getppid(), signal.Signals[name])
        case [name] if name.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[name])
        case _:
            return {entry["do"]}
    return set()


class Points(Dataset[tuple[Tensor, int]]):
    """Points that are moved a little, anew in each epoch, by numbers from the global generator.

    Args:
        num_samples: how many.
    """

    num_classes = CLASSES

    def __init__(self, num_samples: int) -> None:
        self.centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        passing(f"sample {index}")
        label = index % CLASSES
        return self.centres[label] + 0.3 * torch.randn(FEATURES), label


class Net(nn.Module):
    """Two layers with BatchNorm and dropout between them. `SECONDS_PER_FORWARD` of the environment makes it slow.

    Args:
        num_classes: number of outputs.
        width: of the hidden layer.
    """

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(FEATURES, width), nn.Linear(width, num_classes)])
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.2)
        passing("building")

    def forward(self, inputs: Tensor) -> Tensor:
        left = passing("forward" if self.training else "forward of an evaluation")
        if "move buffer" in left:
            self.norm.running_mean += 0.01
        if self.training and "SECONDS_PER_FORWARD" in os.environ:
            time.sleep(float(os.environ["SECONDS_PER_FORWARD"]))
        logits: Tensor = self.layers[1](self.dropout(self.norm(self.layers[0](inputs)).relu()))
        if "nan" in left:
            logits = logits * math.nan
        if "inf" in left:
            logits.register_hook(lambda gradient: gradient * math.inf)
        return logits


class Boastful(Observer):
    """Somebody's own observer, which is given a key, and at some update fails and shows it.

    Args:
        api_key: what must not be seen.
        fails_at: number of that update; 0 for none.
        mail: more of that kind.
    """

    def __init__(self, api_key: str, fails_at: int = 0, mail: Any = None) -> None:
        self.api_key = api_key
        self.fails_at = fails_at
        self.mail = mail

    def on_update(self, record: UpdateRecord) -> None:
        if record.update == self.fails_at:
            raise RuntimeError(f"can't log in with {self.api_key}, {self.mail}")

"""For how long does saving a checkpoint hold up the training?

    python benchmarks/checkpoint.py

The state of a model with AdamW, saved in four ways while the training goes on, on the disk as it is and on one that is
slowed (bindfs limits what is written per second; apt-get install bindfs). Rounds of all ways are interleaved; medians.

  copy in memory   the floor: every tensor of the state copied into memory that is there already
  asynchronous     distaccum's default
  synchronous      checkpoint.async_save=false
  torch.save       of the two state_dicts, with fsync

`stall` is how long the training loop stands still. `on the disk after` is how long until the checkpoint is whole and
would survive a power cut. `slower updates` is what the updates that ran meanwhile lost besides.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import common
import torch
from torch import nn

from distaccum import Accumulator
from distaccum.checkpoints import Checkpointer
from distaccum.config import CheckpointConfig


class Training:
    """A model with AdamW that makes updates of one micro-step each."""

    def __init__(self, width: int, layers: int, rows: int = 8) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.accumulator = Accumulator(self.model, self.optimizer)
        self.batch = torch.randn(rows, width)
        self.update()

    def update(self) -> float:
        """One update; returns its seconds."""
        started = time.perf_counter()
        with self.accumulator.window([self.batch]) as micro_batches:
            for batch in micro_batches:
                self.accumulator.backward(self.model(batch).square().sum(), len(batch))
        self.accumulator.step()
        return time.perf_counter() - started

    def tensors(self) -> list[torch.Tensor]:
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return [*(parameter.detach() for parameter in self.model.parameters()), *state]


def torch_save(training: Training, path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return sum(entry.stat().st_size for entry in files)


def measure(training: Training, folder: Path, disk: str, rounds: int) -> list[common.Row]:
    """Measures all ways on one disk, that of the folder; returns its rows."""
    copies = [torch.empty_like(tensor) for tensor in training.tensors()]
    checkpointers = {
        name: Checkpointer(
            folder / name, training.model, training.optimizer, config=CheckpointConfig(async_save=is_async)
        )
        for name, is_async in (("asynchronous", True), ("synchronous", False))
    }

    def copy(number: int) -> None:
        for target, tensor in zip(copies, training.tensors(), strict=True):
            target.copy_(tensor)

    ways: dict[str, Callable[[int], None]] = {
        "copy in memory": copy,
        **{name: (lambda number, own=own: own.save(number, {})) for name, own in checkpointers.items()},  # type: ignore[misc]
        "torch.save": lambda number: torch_save(training, folder / "torch.pt"),
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in common.rounds(rounds + 1, f"disk {disk}: round"):
        for name, save in ways.items():
            alone = statistics.median(training.update() for _ in range(5))
            started = time.perf_counter()
            save(number)
            stall = time.perf_counter() - started
            beside = []
            while checkpointers["asynchronous"].is_busy():
                beside.append(training.update())
            on_disk = time.perf_counter() - started
            if number:  # the first round makes the memory that the others use again
                found[name].append((stall, on_disk, sum(beside) - alone * len(beside)))
    sizes = {name: size_of(next((folder / name).iterdir())) for name in checkpointers}
    sizes["torch.save"] = size_of(folder / "torch.pt")
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    floor = medians["copy in memory"][0]
    return [
        {
            "disk": disk,
            "way": name,
            "stall (ms)": stall * 1e3,
            "stall / copy": stall / floor,
            "on the disk after (s)": on_disk if name in sizes else None,
            "slower updates (ms)": slower * 1e3 if name == "asynchronous" else None,
            "MB": sizes[name] / 1e6 if name in sizes else None,
        }
        for name, (stall, on_disk, slower) in medians.items()
    ]


@contextmanager
def slowed(folder: Path, megabytes_per_second: float) -> Iterator[Path]:
    """Mounts the folder a second time, where writes are no faster; yields that path."""
    mount = folder.with_name(f"{folder.name}-slowed")
    mount.mkdir()
    rate = int(megabytes_per_second * 1e6)
    subprocess.run(["bindfs", f"--write-rate={rate}", str(folder), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def measured(slow: float, is_quick: bool) -> Iterator[common.Row]:
    """Measures on the disk as it is, and slowed to so many megabytes per second."""
    width, layers, rounds = (256, 8, 1) if is_quick else (1024, 16, 5)
    training = Training(width, layers)
    with tempfile.TemporaryDirectory(dir=".") as place:
        own, other = Path(place, "own"), Path(place, "other")
        own.mkdir()
        yield from measure(training, own, "as it is", rounds)
        if shutil.which("bindfs") is None:
            common.progress("no bindfs here, so no slowed disk: apt-get install bindfs")
            return
        other.mkdir()
        with slowed(other, slow) as mount:
            yield from measure(training, mount, f"{slow:g} MB/s", rounds=1 if is_quick else 2)


def main() -> None:
    parser = common.arguments(__doc__, quick="10 seconds", full="6 minutes")
    parser.add_argument("--slow", type=float, default=20.0, help="megabytes per second of the slowed disk")
    options = common.begin(parser)
    torch.set_num_threads(1)
    rows = common.show("Saving the state beside updates", measured(options.slow, options.quick))
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()

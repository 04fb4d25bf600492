"""What does cutting each window by length, or packing it, save on text of unequal lengths?

    python benchmarks/padding.py

Documentation paragraphs (cut at 512 bytes, most far shorter) under a small GPT, windows of 64:

  distaccum, uniform      micro-batches of equal sample counts, padded to their own longest: dynamic padding
  distaccum, by_length    the same windows, samples of like length together under the token budget of the costliest
                          micro-batch of `uniform`
  distaccum, packed       the same windows, samples put end to end under the same budget, attention inside each
  Transformers, dynamic   its Trainer with a collator that pads to the longest of the micro-batch; the same samples
  Transformers, grouped   its Trainer with train_sampling_strategy="group_by_length". This one changes the sampling:
                          each window then holds neighbours in length, not a random draw

Tokens computed for each real one, seconds per window, and samples per second against the first and the third, medians
over interleaved rounds over the same samples. The error is that of the update in float64 against the one-shot update
of the window it was given, largest of some windows.

Needs the extra: pip install "distaccum[bench]".
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers_contenders import IGNORE_INDEX, WithLoss, quieten, require_peers, transformers_trained
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from distaccum import Accumulator, WindowLoader, shuffled
from distaccum.data import DocumentationText
from distaccum.models import GPT
from distaccum.planning.costs import CostFit, CostModel
from distaccum.tasks.model_io import call_model

MAX_LENGTH = 512
WINDOW = 64
MICRO_BATCH_SIZE = 8
UNIFORM, BY_LENGTH, PACKED = "distaccum, uniform", "distaccum, by_length", "distaccum, packed"
DYNAMIC, GROUPED = "Transformers, dynamic", "Transformers, grouped"


class Probe:
    """Watches a model and its optimizer: tokens computed, seconds, and the gradient that each update was made of."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, keeps_gradients: bool) -> None:
        self.computed = 0
        self.started: float | None = None
        self.ended = 0.0
        self.gradients: list[Tensor] = []
        self._model = model
        self._keeps_gradients = keeps_gradients
        model.register_forward_pre_hook(
            lambda _, arguments, by_name: self._see(arguments[0] if arguments else by_name["tokens"]), with_kwargs=True
        )
        optimizer.register_step_post_hook(lambda *_: self._end())

    @property
    def seconds(self) -> float:
        """From the first forward to the end of the last update: no contender's start-up counts."""
        assert self.started is not None
        return self.ended - self.started

    def _see(self, inputs: Tensor) -> None:
        if self.started is None:
            self.started = time.perf_counter()
        self.computed += inputs.numel()

    def _end(self) -> None:
        self.ended = time.perf_counter()
        if self._keeps_gradients:
            self.gradients.append(gradient_of(self._model))


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]).clone()


class Chosen(Dataset[Any]):
    """The samples of the first windows, in the order in which distaccum draws them.

    Attributes:
        read: the samples that were asked for, by their indices in the data.
    """

    def __init__(self, data: DocumentationText, indices: list[int]) -> None:
        self.data, self.indices = data, indices
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.read.append(self.indices[index])
        inputs, targets = self.data[self.indices[index]]
        return {"input_ids": inputs, "labels": targets}


Train = Callable[[nn.Module, torch.optim.Optimizer], list[int]]
"""Makes the updates; returns the samples it drew, in its order."""


class Text:
    """The data, and how each contender makes its updates of it.

    Args:
        windows: number of updates.
        width: of the model.
        max_length: that paragraphs are cut at, in bytes.
    """

    def __init__(self, windows: int, width: int, max_length: int) -> None:
        self.data = DocumentationText("train", max_length=max_length)
        self.windows = windows
        self.width = width
        self.costs: CostModel | None = None

    def model(self) -> GPT:
        torch.manual_seed(0)
        return GPT(vocab_size=256, max_length=self.data.max_length, num_layers=2, num_heads=2, width=self.width)

    def drawn(self) -> list[int]:
        """The samples of the windows, over all ranks."""
        loader = WindowLoader(self.data, global_batch_size=WINDOW, rank=0, world_size=1)
        order: list[int] = shuffled(range(self.windows * WINDOW), loader.num_samples, loader.seed, epoch=0).tolist()
        return order

    def by_distaccum(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, cut: str) -> list[int]:
        if ranks() > 1:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        loader = WindowLoader(
            self.data,
            global_batch_size=WINDOW,
            micro_batch_size=MICRO_BATCH_SIZE,
            lengths=self.data.lengths if cut != UNIFORM else None,
            packed=cut == PACKED,
        )
        if cut == BY_LENGTH and self.costs is not None:
            loader.cuts.set_costs(self.costs, now=-1 - loader.cuts.windows_ahead)  # in force from the first window on
        accumulator = Accumulator(model, optimizer, time_micro_steps=True)
        fit = CostFit()
        for window in itertools.islice(loader, self.windows):
            shapes: list[torch.Size] = []
            with accumulator.window(window) as micro_batches:
                for inputs, targets in micro_batches:
                    shapes.append(targets.shape)
                    logits = call_model(model, inputs).flatten(0, 1)
                    loss_sum = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
                    accumulator.backward(loss_sum, weight=(targets != IGNORE_INDEX).sum())
            result = accumulator.step()
            # The last micro-step's time has the sync in it.
            for (count, length), seconds in zip(shapes[:-1], result.micro_seconds[:-1], strict=True):
                fit.add(count, length, seconds)
        if cut == BY_LENGTH and self.costs is None:
            # As the Trainer does: what was measured in one part of a run is in force in those that follow.
            costs = [fit.fit()]
            if ranks() > 1:
                dist.broadcast_object_list(costs, src=0)
            self.costs = costs[0]
        return self.drawn()

    def by_transformers(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, strategy: str) -> list[int]:
        def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            inputs, labels = self.data.collate_fn([(sample["input_ids"], sample["labels"]) for sample in samples])
            return {"input_ids": inputs, "labels": labels}

        chosen = Chosen(self.data, self.drawn())
        transformers_trained(
            WithLoss(model),
            optimizer,
            chosen,
            collate,
            per_device_train_batch_size=MICRO_BATCH_SIZE,
            gradient_accumulation_steps=WINDOW // MICRO_BATCH_SIZE,
            max_grad_norm=0.0,
            train_sampling_strategy=strategy,
        )
        return chosen.read[-len(chosen) :]  # before that, its sampler reads all of them for their lengths

    def contenders(self) -> dict[str, Train]:
        own: dict[str, Train] = {
            UNIFORM: functools.partial(self.by_distaccum, cut=UNIFORM),
            BY_LENGTH: functools.partial(self.by_distaccum, cut=BY_LENGTH),
            PACKED: functools.partial(self.by_distaccum, cut=PACKED),
        }
        if ranks() > 1:
            return own
        return {
            **own,
            DYNAMIC: functools.partial(self.by_transformers, strategy="sequential"),
            GROUPED: functools.partial(self.by_transformers, strategy="group_by_length"),
        }


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def over_ranks(number: int) -> int:
    total = torch.tensor(number)
    if ranks() > 1:
        dist.all_reduce(total)
    return int(total)


def timed(text: Text, rounds: int) -> list[common.Row]:
    """Returns rows of seconds and tokens, of interleaved rounds, of which the first one doesn't count."""
    real = sum(text.data.lengths[index] for index in text.drawn())
    seconds: dict[str, list[float]] = {name: [] for name in text.contenders()}
    computed: dict[str, int] = {}
    for number in common.rounds(rounds + 1, f"{ranks()} ranks: round"):
        for name, train in text.contenders().items():
            model = text.model()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            probe = Probe(model, optimizer, keeps_gradients=False)
            train(model, optimizer)
            if number:
                seconds[name].append(probe.seconds / text.windows)
            computed[name] = over_ranks(probe.computed)

    def speed_up(name: str, over: str) -> float | None:
        if over not in seconds:
            return None
        return statistics.median(base / own for own, base in zip(seconds[name], seconds[over], strict=True))

    return [
        {
            "ranks": ranks(),
            "contender": name,
            "sampling": "grouped by length" if name == GROUPED else "random",
            "tokens computed / real": computed[name] / real,
            "s/window": statistics.median(own),
            "samples/s / uniform": speed_up(name, UNIFORM),
            "samples/s / dynamic": speed_up(name, DYNAMIC),
        }
        for name, own in seconds.items()
    ]


def error(text: Text, train: Train) -> float:
    """Largest relative error of an update against the one-shot update of the samples it drew, in float64."""
    model = text.model().double()
    oracle = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = Probe(model, optimizer, keeps_gradients=True)
    drawn = train(model, optimizer)
    found = []
    for number, gradient in enumerate(probe.gradients):
        samples = [text.data[index] for index in drawn[number * WINDOW : (number + 1) * WINDOW]]
        inputs, targets = text.data.collate_fn(samples)
        oracle.zero_grad()
        F.cross_entropy(oracle(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX).backward()
        wanted = gradient_of(oracle)
        found.append(float((gradient - wanted).norm() / wanted.norm()))
    return max(found)


def on_a_rank(world_size: int, is_quick: bool) -> None:
    torch.set_num_threads(1)
    quieten()
    if world_size > 1:
        dist.init_process_group("gloo")
    width, max_length = (32, 288) if is_quick else (128, MAX_LENGTH)
    rows = timed(Text(3 if is_quick else 12, width, max_length), rounds=1 if is_quick else 5)
    checked = Text(1 if is_quick else 3, width, max_length)
    for row in rows:
        common.send({**row, "error of the update": error(checked, checked.contenders()[row["contender"]])})
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    if words := common.rank_words():
        on_a_rank(int(words[0]), words[1] == "quick")
        return
    options = common.begin(common.arguments(__doc__, quick="20 seconds", full="8 minutes"))
    require_peers()
    extent = "quick" if options.quick else "full"
    rows = common.show(
        f"Windows of {WINDOW} documentation paragraphs under a GPT of 2 layers",
        (row for n in (1, 2) for row in common.on_ranks(n, __file__, str(n), extent, imports=["transformers.trainer"])),
    )
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()

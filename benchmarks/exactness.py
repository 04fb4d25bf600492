"""How far is an accumulated update from the large-batch update?

    python benchmarks/exactness.py

The gradient of real windows of documentation paragraphs (unequal lengths) under a small GPT in float64, against the
gradient of the whole window in one micro-batch: accumulated as tutorials do (the mean of each micro-batch, divided by
K) and by distaccum, for full windows and for the ragged one at the end of an epoch.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum import Accumulator, WindowLoader
from distaccum.data import DocumentationText
from distaccum.models import GPT

GLOBAL_BATCH_SIZE = 32


def loss_sum_of(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    loss_sum = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss_sum, (targets != -100).sum()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]).clone()


def divided_by_k(model: nn.Module, window: list[Any], steps: int) -> Tensor:
    model.zero_grad()
    for batch in window:
        loss_sum, weight = loss_sum_of(model, batch)
        (loss_sum / weight / steps).backward()
    return gradient(model)


def by_distaccum(model: nn.Module, window: list[Any]) -> Tensor:
    found: list[Tensor] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: found.append(gradient(model)))
    accumulator = Accumulator(model, optimizer)
    with accumulator.window(window) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(*loss_sum_of(model, batch))
    accumulator.step()
    return found[0]


def measure(steps: int, windows: int) -> list[common.Row]:
    common.progress(f"K = {steps}")
    torch.manual_seed(0)
    data = DocumentationText("train", max_length=256)
    model = GPT(num_layers=2, num_heads=2, width=32, vocab_size=256, max_length=256).double()
    size = GLOBAL_BATCH_SIZE // steps
    loader = WindowLoader(data, global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=size)
    errors: dict[tuple[str, str], list[float]] = {}
    last = len(loader) - 1
    for window in loader:
        if window.index >= windows and window.index != last:
            continue
        batches = list(window)
        if window.index == last:
            batches = batches[: max(1, len(batches) // 2)]  # half a window, whatever the data's length leaves
        model.zero_grad()
        samples = [data[i] for ids in window.sample_indices[: len(batches)] for i in ids]
        loss_sum, weight = loss_sum_of(model, data.collate_fn(samples))
        (loss_sum / weight).backward()
        wanted = gradient(model)
        kind = "ragged" if window.index == last else "full"
        for method, found in (
            ("mean of means, divided by K", divided_by_k(model, batches, steps)),
            ("distaccum", by_distaccum(model, batches)),
        ):
            error = float((found - wanted).norm() / wanted.norm())
            errors.setdefault((method, kind), []).append(error)
    return [
        {"method": method, "K": steps, "window": kind, "relative error of the update": statistics.median(values)}
        for (method, kind), values in errors.items()
    ]


def plot(rows: list[common.Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    colours = {"mean of means, divided by K": "#c44e52", "distaccum": "#4c72b0"}
    groups = sorted({(row["K"], row["window"]) for row in rows})
    for offset, (method, colour) in enumerate(colours.items()):
        values = {(r["K"], r["window"]): r["relative error of the update"] for r in rows if r["method"] == method}
        places = [index + 0.38 * (offset - 0.5) for index in range(len(groups))]
        heights = [values[group] for group in groups]
        bars = axes.bar(places, heights, 0.36, color=colour, label=method)
        axes.bar_label(bars, [f"{height:.0e}" if height < 1e-3 else f"{height:.1%}" for height in heights], fontsize=7)
    axes.set_yscale("log")
    axes.set_ylim(1e-17, 50)
    axes.set_xticks(range(len(groups)), [f"K = {steps}\n{kind} window" for steps, kind in groups], fontsize=8)
    axes.set_ylabel("relative error of the update")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2, fontsize=8)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = common.arguments(__doc__, quick="10 seconds", full="20 seconds")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figure into FILE (.svg or .png)")
    options = common.begin(parser)
    torch.set_num_threads(1)
    rows = common.show(
        "Error of the update against the large batch (float64, medians over windows)",
        (row for steps in (2, 4, 8) for row in measure(steps, windows=2 if options.quick else 8)),
    )
    if options.write:
        common.write(__doc__, rows)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()

"""Segmentation: one class per pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distaccum.accumulation.result import TaskOutput
from distaccum.errors import UserError
from distaccum.tasks.base import Task
from distaccum.tasks.cross_entropy import inputs_and_targets, summed_cross_entropy


class Segmentation(Task):
    """Cross-entropy over the class of each pixel. Weight: valid pixels.

    Metrics: `accuracy` over pixels, and `mean_iou`, the mean over classes of intersection / union. Both are made of
    counts, so they are those of all pixels together, whatever the micro-batches and ranks. In `mean_iou`, classes that
    neither the targets nor the predictions have don't count.

    A micro-batch is `(images, targets)`, the targets integers `[B, H, W]`; the model's logits are `[B, C, H, W]`.

    Args:
        ignore_index: the target of pixels that count nowhere.

    Raises:
        UserError: from a call, a micro-batch or logits of another form.
    """

    class_dim = 1

    def __init__(self, ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        images, targets = inputs_and_targets(batch, "Segmentation")
        logits = model(images)
        if targets.dim() != 3 or logits.dim() != 4 or logits.shape[:1] + logits.shape[2:] != targets.shape:
            raise UserError(
                f"Segmentation needs logits [samples, classes, height, width] and targets [samples, height, width], "
                f"and got logits {list(logits.shape)} and targets {list(targets.shape)}."
            )
        classes = logits.shape[1]
        flat = targets.flatten()
        loss_sum = summed_cross_entropy(
            logits.permute(0, 2, 3, 1).reshape(-1, classes), flat, "Segmentation", ignore_index=self.ignore_index
        )
        valid = flat != self.ignore_index
        predicted = logits.detach().argmax(dim=1).flatten()
        hits = _counts(flat, valid & (predicted == flat), classes)
        there, claimed = _counts(flat, valid, classes), _counts(predicted, valid, classes)
        sums = {"intersections": hits, "unions": there + claimed - hits}
        # The number of valid pixels stays on the device: reading it here would make the host wait.
        return TaskOutput(loss_sum=loss_sum, weight=valid.sum(), sums=sums)

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        hits, unions = sums["intersections"], sums["unions"]
        is_there = unions > 0
        return {"accuracy": float(hits.sum()) / weight, "mean_iou": float((hits[is_there] / unions[is_there]).mean())}


def _counts(labels: Tensor, chosen: Tensor, classes: int) -> Tensor:
    """How many of the chosen pixels each class has, `[classes]`."""
    # Not bincount, whose result has a size that the host waits for.
    counts = torch.zeros(classes + 1, dtype=torch.int64, device=labels.device)
    places = torch.where(chosen, labels, classes)
    return counts.scatter_add_(0, places, torch.ones_like(places))[:classes]

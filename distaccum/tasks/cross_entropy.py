"""Cross-entropies: one class per sample, per token or per pixel."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.accumulation.result import TaskOutput
from distaccum.config.enums import Normalize
from distaccum.errors import UserError
from distaccum.models.outputs import logits_of
from distaccum.tasks.base import Task
from distaccum.tasks.model_io import call_model, inputs_and_targets


class _CrossEntropy(Task):
    """The common part of the three. Raises a `UserError` in a call, for a micro-batch or logits of another form."""

    class_dim: int = 1
    ignore_index = torch.iinfo(torch.int64).min
    """No target is ignored. With torch's default, one of -100 would add nothing to the loss and still count."""
    label_smoothing = 0.0
    _logits_form: tuple[str, ...]
    _targets_form: tuple[str, ...]

    def _computed(self, model: nn.Module, batch: Any, reduction: str = "sum") -> tuple[Tensor, Tensor, Tensor, int]:
        """Returns the summed loss in float32 at least, predicted classes `[N]`, targets, number of classes.

        Args:
            reduction: `none` for the loss of each target `[N]` in place of the sum.
        """
        name = type(self).__name__
        inputs, targets = inputs_and_targets(batch, name)
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise UserError(f"{name} needs integers as targets, and got {targets.dtype}.")
        targets = targets.long()  # an unsigned format has no place for an ignore_index of -100
        logits = logits_of(call_model(model, inputs))
        fits = (logits.dim(), targets.dim()) == (len(self._logits_form), len(self._targets_form))
        if not fits or logits.select(self.class_dim, 0).shape != targets.shape:
            raise UserError(
                f"{name} needs logits [{', '.join(self._logits_form)}] and targets [{', '.join(self._targets_form)}], "
                f"and got logits {list(logits.shape)} and targets {list(targets.shape)}."
            )
        rows, flat = logits.movedim(self.class_dim, -1).flatten(0, -2), targets.flatten()
        predicted = rows.detach().argmax(dim=-1)
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()  # a sum over many elements overflows float16 and loses digits in bfloat16
        try:
            loss_sum = F.cross_entropy(
                rows, flat, reduction=reduction, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
            )
        except IndexError as error:  # on CUDA it is the device that stops: looking at targets would make the host wait
            raise UserError(
                f"{name}: the model has {rows.shape[-1]} outputs, which does not cover all targets ({error}) "
                "They must be integers from 0 to one below the number of outputs."
            ) from error
        return loss_sum, predicted.view_as(targets), targets, rows.shape[-1]


class Classification(_CrossEntropy):
    """Cross-entropy over classes. Weight: samples. Metric: `accuracy`.

    A micro-batch is `(inputs, targets)`, or a mapping with both (see `distaccum.tasks.model_io`), the targets integers
    `[B]`; the model's logits are `[B, C]`.

    Args:
        label_smoothing: probability mass spread over all classes, in [0, 1).

    Raises:
        UserError: an impossible argument; and from a call, a micro-batch or logits of another form.
    """

    _logits_form, _targets_form = ("samples", "classes"), ("samples",)

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task.label_smoothing={label_smoothing} must lie in [0, 1).")
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        loss_sum, predicted, targets, _ = self._computed(model, batch)
        return TaskOutput(loss_sum=loss_sum, weight=len(targets), sums={"accuracy": (predicted == targets).sum()})


class LanguageModeling(_CrossEntropy):
    """Cross-entropy over the next token. Metric: `accuracy`, the share of valid targets predicted.

    A micro-batch is `(inputs, targets)`, both integers `[B, T]`, the targets already one token ahead; the model's
    logits are `[B, T, V]`.

    Args:
        ignore_index: the target of padding, which counts neither in the loss nor in the weight.
        normalize: what the loss is a mean over, in the whole window.
            `tokens`: valid targets, each of which counts alike; a long sample counts more than a short one.
            `sequences`: samples that have a valid target, each with the mean over its own valid targets.
            `samples`: all samples, each with the sum over its valid targets, which is the negative log-likelihood of
            the whole sample.

    Raises:
        UserError: an impossible argument; and from a call, a micro-batch or logits of another form.
    """

    class_dim = -1
    _logits_form, _targets_form = ("samples", "length", "tokens"), ("samples", "length")

    def __init__(self, ignore_index: int = -100, normalize: str = "tokens") -> None:
        if normalize not in list(Normalize):
            raise UserError(f"task.normalize={normalize} is none of {', '.join(Normalize)}.")
        self.ignore_index = ignore_index
        self.normalize = Normalize(normalize)

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        by_sequence = self.normalize is Normalize.sequences
        loss, predicted, targets, _ = self._computed(model, batch, "none" if by_sequence else "sum")
        valid = targets != self.ignore_index
        correct = (valid & (predicted == targets)).sum()
        # The number of valid targets stays on the device: reading it here would make the host wait.
        tokens = valid.sum()
        if self.normalize is Normalize.tokens:
            return TaskOutput(loss_sum=loss, weight=tokens, sums={"accuracy": correct})
        sums = {"accuracy": correct, "tokens": tokens}
        if not by_sequence:
            return TaskOutput(loss_sum=loss, weight=len(targets), sums=sums)
        lengths = valid.sum(1)
        loss_sum = (loss.view_as(targets).sum(1) / lengths.clamp(min=1)).sum()
        return TaskOutput(loss_sum=loss_sum, weight=(lengths > 0).sum(), sums=sums)

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        if "tokens" not in sums:  # the weight counts them, or a subclass gives sums of its own
            return super().metrics(sums, weight)
        tokens = float(sums["tokens"])
        return {"accuracy": float(sums["accuracy"]) / tokens if tokens else math.nan}


class Segmentation(_CrossEntropy):
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

    _logits_form, _targets_form = ("samples", "classes", "height", "width"), ("samples", "height", "width")

    def __init__(self, ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        loss_sum, predicted, targets, classes = self._computed(model, batch)
        valid = targets != self.ignore_index
        hits = _counts(targets, valid & (predicted == targets), classes)
        there, claimed = _counts(targets, valid, classes), _counts(predicted, valid, classes)
        sums = {"intersections": hits, "unions": there + claimed - hits}
        # As above, the number stays on the device.
        return TaskOutput(loss_sum=loss_sum, weight=valid.sum(), sums=sums)

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        hits, unions = sums["intersections"], sums["unions"]
        is_there = unions > 0
        return {"accuracy": float(hits.sum()) / weight, "mean_iou": float((hits[is_there] / unions[is_there]).mean())}


def _counts(labels: Tensor, chosen: Tensor, classes: int) -> Tensor:
    """Counts the chosen pixels of each class, `[classes]`."""
    # Not bincount, whose result has a size that the host waits for.
    counts = torch.zeros(classes + 1, dtype=torch.int64, device=labels.device)
    places = torch.where(chosen, labels, classes).flatten()
    return counts.scatter_add_(0, places, torch.ones_like(places))[:classes]

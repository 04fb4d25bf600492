"""Soft Dice, Tversky index and soft IoU of all pixels of a window, with or without a cross-entropy beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.errors import UserError
from distaccum.models.outputs import logits_of
from distaccum.tasks.cross_entropy import overlap_metrics
from distaccum.tasks.model_io import as_classes, call_model, inputs_and_targets
from distaccum.tasks.sums import SumsTask


class Dice(SumsTask):
    """1 − the mean over classes of the Tversky index of all valid pixels of the window; by default, that is soft Dice.

    With the sums over pixels of p (the softmax's probability of the class) and y (1 where it is the target, else 0):

        index = (Σ p y + smooth) / (Σ p y + alpha · Σ p (1 − y) + beta · Σ (1 − p) y + smooth)

    (Salehi et al. 2017, "Tversky loss function for image segmentation"). `alpha` = `beta` = 0.5 is Dice
    (2 Σ p y / (Σ p + Σ y)), both 1 the soft intersection over union. All classes count, the background too, and
    those that the window's targets don't have.

    A micro-batch is `(images, targets)`, or a mapping with both (see `distaccum.tasks.model_io`), the targets integers
    `[B, …]` with any number of dimensions; the model's logits are `[B, C, …]`. Weight: samples. Metrics: `accuracy` and
    `mean_iou`, as those of `Segmentation`.

    Args:
        alpha: weight of false positives.
        beta: weight of false negatives.
        cross_entropy: coefficient of the mean cross-entropy over the window's valid pixels, which is added.
        smooth: keeps the ratio of a class that is nowhere from being 0 / 0.
        ignore_index: the target of pixels that count nowhere.

    Raises:
        UserError: an impossible argument; and from a call, a micro-batch or logits of another form.
    """

    class_dim = 1

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        cross_entropy: float = 0.0,
        smooth: float = 1e-5,
        ignore_index: int = 255,
    ) -> None:
        if not (alpha >= 0 and beta >= 0 and alpha + beta > 0):
            raise UserError(f"task.alpha={alpha} and task.beta={beta} must be at least 0, and not both 0.")
        if not cross_entropy >= 0:
            raise UserError(f"task.cross_entropy={cross_entropy} must be at least 0.")
        if not smooth > 0:
            raise UserError(f"task.smooth={smooth} must be greater than 0: a class that is nowhere would be 0 / 0.")
        self.alpha, self.beta, self.cross_entropy, self.smooth = alpha, beta, cross_entropy, smooth
        self.ignore_index = ignore_index

    def sums(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        inputs, targets = inputs_and_targets(batch, "Dice")
        targets = as_classes(targets, "Dice")
        logits = logits_of(call_model(model, inputs))
        if logits.dim() < 3 or logits.select(1, 0).shape != targets.shape:
            raise UserError(
                "Dice needs logits [samples, classes, …] and targets [samples, …], and got logits "
                f"{list(logits.shape)} and targets {list(targets.shape)}."
            )
        # Sums over many pixels overflow float16 and lose digits in bfloat16.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(2).log_softmax(dim=1)
        targets, classes = targets.flatten(1), wide.shape[1]
        try:
            losses = F.nll_loss(wide, targets, reduction="none", ignore_index=self.ignore_index)
        except IndexError as error:  # on CUDA it is the device that stops: looking at targets would make the host wait
            raise UserError(
                f"Dice: the model has {classes} classes, which does not cover all targets ({error}) They must be "
                "integers from 0 to one below the number of classes, often model.num_classes."
            ) from error
        valid = (targets != self.ignore_index).unsqueeze(1)
        labels = torch.arange(classes, device=targets.device).view(1, -1, 1)
        wanted = (targets.unsqueeze(1) == labels) & valid
        found = (wide.detach().argmax(dim=1, keepdim=True) == labels) & valid
        probabilities = wide.exp()
        hits, there = (found & wanted).sum(dim=2), wanted.sum(dim=2)
        return {
            "overlap": torch.where(wanted, probabilities, 0.0).sum(dim=2),
            "claimed": torch.where(valid, probabilities, 0.0).sum(dim=2),
            "there": there,
            "log_loss": (losses if self.cross_entropy else losses.detach()).sum(dim=1),
            "intersections": hits,
            "unions": there + found.sum(dim=2) - hits,
        }

    def loss(self, sums: Mapping[str, Tensor]) -> Tensor:
        overlap, claimed, there = sums["overlap"], sums["claimed"], sums["there"]
        wrong = self.alpha * (claimed - overlap) + self.beta * (there - overlap)
        loss = 1 - ((overlap + self.smooth) / (overlap + wrong + self.smooth)).mean()
        return loss + self.cross_entropy * sums["log_loss"] / there.sum().clamp(min=1)

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        return overlap_metrics(sums["intersections"], sums["unions"])

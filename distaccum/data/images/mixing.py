"""Mixup and CutMix, sample by sample: what a sample becomes doesn't depend on its micro-batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distaccum.errors import UserError, require


class Mixing:
    """Mixes a sample with another one that is drawn for it from the whole dataset.

    Partners, shares and boxes come from the global generator of `random`, which a run's loaders seed for each sample by
    seed, epoch and index. So a window's samples are the same for any cut. Mixing within a micro-batch, in a collate
    function, would give a sample another partner in another cut.

    Args:
        mixup: α of mixup (Zhang et al. 2018): λ·image + (1-λ)·other with λ from Beta(α, α). 0: no mixup.
        cutmix: α of CutMix (Yun et al. 2019): a box of the fraction 1-λ of the area comes from the other. 0: no CutMix.
            With both, each of a sample's mixes is one or the other, by a fair coin.
        probability: fraction of the samples that are mixed, in [0, 1].

    Raises:
        UserError: an impossible argument.
    """

    def __init__(self, mixup: float = 0.0, cutmix: float = 0.0, probability: float = 1.0) -> None:
        require(mixup >= 0, f"mixup={mixup} is impossible: it must be at least 0.")
        require(cutmix >= 0, f"cutmix={cutmix} is impossible: it must be at least 0.")
        require(0 <= probability <= 1, f"the probability={probability} of mixing must lie in [0, 1].")
        self._mixup = mixup
        self._cutmix = cutmix
        self._probability = probability

    @property
    def mixes(self) -> bool:
        """Whether there is anything to mix."""
        return (self._mixup > 0 or self._cutmix > 0) and self._probability > 0

    def __call__(self, load: Callable[[int], Any], index: int, count: int, num_classes: int) -> tuple[Tensor, Tensor]:
        """Returns a mixed image `[channels, height, width]`, and the probability of each class, float32 `[classes]`.

        Args:
            load: returns an image and its class, by its index.
            index: which one to mix.
            count: number of images to draw the other one from.
            num_classes: number of classes.

        Raises:
            UserError: a sample has another form, or two have images of different shapes.
        """
        image, target = self._one(load, index, num_classes)
        if random.random() >= self._probability:
            return image, target
        cuts = self._cutmix > 0 and (self._mixup == 0 or random.random() < 0.5)
        alpha = self._cutmix if cuts else self._mixup
        share, partner = random.betavariate(alpha, alpha), random.randrange(count)
        other, other_target = self._one(load, partner, num_classes)
        if image.shape != other.shape:
            raise UserError(
                f"samples {index} and {partner} can't be mixed: their images have the shapes {list(image.shape)} and "
                f"{list(other.shape)}."
            )
        if cuts:
            image, share = _cut_into(image, other, share)
        else:
            image = share * image + (1 - share) * other
        return image, share * target + (1 - share) * other_target

    @staticmethod
    def _one(load: Callable[[int], Any], index: int, num_classes: int) -> tuple[Tensor, Tensor]:
        sample = load(index)
        is_pair = isinstance(sample, tuple | list) and len(sample) == 2 and isinstance(sample[0], Tensor)
        if not is_pair or sample[0].dim() < 2 or not sample[0].is_floating_point():
            raise UserError(
                f"sample {index} can't be mixed: it must be an image, a floating-point tensor [channels, height, "
                "width], and its class, an integer."
            )
        label = int(sample[1])
        require(0 <= label < num_classes, f"sample {index} has the class {label}, and there are {num_classes} classes.")
        target = torch.zeros(num_classes)
        target[label] = 1.0
        return sample[0], target


class Mixed(Dataset[tuple[Tensor, Tensor]]):
    """A dataset whose samples are mixed, with mixup or CutMix: `Mixing` around any dataset of images and classes.

    Its other attributes (`num_classes`, `input_shape`, …) are those of the dataset.

    Args:
        dataset: samples are an image, a floating-point tensor `[channels, height, width]`, and its class, an integer.
        mixup: as for `Mixing`, and so are the next two.
        num_classes: number of classes; None: the dataset's attribute of that name.

    Raises:
        UserError: an impossible argument, or the number of classes is not known.
    """

    def __init__(
        self,
        dataset: Any,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        probability: float = 1.0,
        num_classes: int | None = None,
    ) -> None:
        self.dataset = dataset
        self._mixing = Mixing(mixup, cutmix, probability)
        require(self._mixing.mixes, "Mixed needs mixup or cutmix above 0: else use the dataset itself.")
        found = getattr(dataset, "num_classes", None) if num_classes is None else num_classes
        if found is None:
            raise UserError(f"Mixed: {type(dataset).__name__} has no attribute num_classes: give num_classes.")
        self.num_classes = int(found)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._mixing(self.dataset.__getitem__, index, len(self.dataset), self.num_classes)

    def __getattr__(self, name: str) -> Any:
        # What loaders ask for (`__getitems__`) and what pickling does must be this dataset's own.
        if name.startswith("_") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _cut_into(image: Tensor, other: Tensor, share: float) -> tuple[Tensor, float]:
    """Returns the image with a box of the other, and the fraction of its area that is left of it."""
    height, width = image.shape[-2:]
    side = (1 - share) ** 0.5
    tall, wide = round(height * side), round(width * side)
    upper, left = random.randrange(height) - tall // 2, random.randrange(width) - wide // 2
    rows = slice(max(0, upper), min(height, upper + tall))
    columns = slice(max(0, left), min(width, left + wide))
    cut = image.clone()
    cut[..., rows, columns] = other[..., rows, columns]
    return cut, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)

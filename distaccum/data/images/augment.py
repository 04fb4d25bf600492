"""Random changes of images while they are trained on, with Pillow."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from distaccum.errors import UserError, require
from distaccum.runtime.torchvision_operators import tolerate_missing_operators

if TYPE_CHECKING:
    from PIL.Image import Image

_RATIO = 4 / 3
_TRIES = 10


class Augment:
    """Changes an image at random: crop, flip, colours, then RandAugment, then a transform of your own.

    All is drawn from the global generator of `random` (RandAugment: of `torch`). A run's loaders seed them for each
    sample by seed, epoch and index, so that a sample is the same for any cut.

    Args:
        crop: smallest and largest area of a random crop, as fractions of the image, with a ratio of the sides between
            3/4 and 4/3 (Szegedy et al. 2015). None: the whole image.
        flip: probability of a left-right flip, in [0, 1].
        colour: brightness, contrast and saturation are each multiplied by a number in [1 - colour, 1 + colour].
        randaugment: magnitude of two random operations (Cubuk et al. 2020), 1 to 30; needs torchvision. 0: none.
        transform: is given the image in the end, and returns one of the same size.

    Raises:
        UserError: impossible arguments, or torchvision can't be imported.
    """

    def __init__(
        self,
        crop: Sequence[float] | None = None,
        flip: float = 0.0,
        colour: float = 0.0,
        randaugment: int = 0,
        transform: Callable[[Image], Image] | None = None,
    ) -> None:
        if crop is not None and not (len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1):
            raise UserError(f"crop={list(crop)} must be two fractions of the area, as in crop=[0.35,1].")
        require(0 <= flip <= 1, f"flip={flip} must lie in [0, 1].")
        require(0 <= colour < 1, f"colour={colour} must lie in [0, 1).")
        require(0 <= randaugment <= 30, f"randaugment={randaugment} must lie between 0 (none) and 30.")
        self._area = None if crop is None else (float(crop[0]), float(crop[1]))
        self._flip = flip
        self._colour = colour
        self._transforms: list[Callable[[Any], Any]] = []
        if randaugment:
            self._transforms.append(_rand_augment(randaugment))
        if transform is not None:
            require(callable(transform), f"augment.transform is a {type(transform).__name__}, which can't be called.")
            self._transforms.append(transform)

    @property
    def crops(self) -> bool:
        """Whether it crops, and so makes an image's size what it must be."""
        return self._area is not None

    def __call__(self, image: Image, size: int) -> Image:
        """Returns the changed image, of `size × size` pixels.

        Args:
            image: RGB; of that size already, unless it `crops`.
            size: height and width.

        Raises:
            UserError: the transform has returned something else.
        """
        from PIL import Image, ImageEnhance

        if self._area is not None:
            box = _box(image.width, image.height, *self._area)
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        if self._flip and random.random() < self._flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._colour:
            for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = kind(image).enhance(random.uniform(1 - self._colour, 1 + self._colour))
        for transform in self._transforms:
            image = transform(image)
        if not isinstance(image, Image.Image) or (image.size, image.mode) != ((size, size), "RGB"):
            raise UserError(
                f"augment.transform must return an RGB image of {size}×{size} pixels, as it is given; got {image!r}."
            )
        return image


def _box(width: int, height: int, smallest: float, largest: float) -> tuple[int, int, int, int]:
    """Draws a crop: left, upper, right, lower."""
    for _ in range(_TRIES):
        area = width * height * random.uniform(smallest, largest)
        ratio = math.exp(random.uniform(-math.log(_RATIO), math.log(_RATIO)))
        across, down = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if across <= width and down <= height:
            left, upper = random.randint(0, width - across), random.randint(0, height - down)
            return left, upper, left + across, upper + down
    # A long image: its middle, as near to a square as the ratios allow.
    across, down = min(width, max(1, round(height * _RATIO))), min(height, max(1, round(width * _RATIO)))
    left, upper = (width - across) // 2, (height - down) // 2
    return left, upper, left + across, upper + down


def _rand_augment(magnitude: int) -> Callable[[Any], Any]:
    tolerate_missing_operators()
    try:
        from torchvision.transforms import v2
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"randaugment={magnitude} needs torchvision, which cannot be imported ({type(error).__name__}: {error}). "
            "Install it: pip install 'distaccum[vision]'; or set randaugment=0 (all else needs Pillow alone)."
        ) from error
    found: Callable[[Any], Any] = v2.RandAugment(magnitude=magnitude, interpolation=v2.InterpolationMode.BILINEAR)
    return found

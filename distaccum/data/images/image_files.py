"""Reads images with Pillow, and makes tensors of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distaccum.config.enums import Fit
from distaccum.data.images.augment import Augment
from distaccum.errors import UserError, not_importable, require

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALL = (64, 64)


def pillow_image() -> ModuleType:
    """Returns the module `PIL.Image`.

    Raises:
        UserError: Pillow can't be imported.
    """
    try:
        from PIL import Image
    except (ImportError, MemoryError) as error:
        raise not_importable("ImageFolder", "Pillow", error) from error
    return Image


def image_extensions() -> set[str]:
    """Returns the endings of the names of files that Pillow can open, with their dots, in small letters."""
    pillow = pillow_image()
    return {extension for extension, name in pillow.registered_extensions().items() if name in pillow.OPEN}


def read_rgb(path: str, content: bytes | None = None, *, small: bool = False) -> Image:
    """Reads an image as RGB, turned as its EXIF orientation says. Transparency is dropped.

    Args:
        path: its file; the name for messages, if its content is given.
        content: the bytes of the image.
        small: let the decoder scale a JPEG down, which reads all of the file in a part of the time.

    Raises:
        UserError: it can't be read, or has more than 8 bits per channel; names the file.
    """
    pillow = pillow_image()
    from PIL import ImageOps

    try:
        with pillow.open(path if content is None else io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would clip them to 255, which turns nearly all of a 16-bit image white.
                raise ValueError(f"its pixels are of mode {image.mode}; convert them to 8 bits per channel")
            if small:
                image.draft("RGB", _SMALL)
            found: Image = ImageOps.exif_transpose(image).convert("RGB")
            return found
    except Exception as error:  # decoders raise all kinds of errors on a damaged file
        # Pillow names the path again, or the object that holds the bytes.
        said = "cannot identify image file" if isinstance(error, pillow.UnidentifiedImageError) else error
        raise UserError(f"{path} cannot be read as an image: {said}") from error


class Pixels:
    """Makes tensors of images: resized to a square with bilinear interpolation, and normalised.

    Args:
        image_size: height and width in pixels.
        mean: subtracted from the three channels, which are in [0, 1].
        std: the three channels are divided by it.
        fit: `stretch` to a square, or `crop` the middle square.
        augment: random changes of an image, drawn from the global generator of `random`.

    Raises:
        UserError: impossible arguments.
    """

    def __init__(
        self, image_size: int, mean: Sequence[float], std: Sequence[float], fit: str, augment: Augment | None
    ) -> None:
        require(image_size >= 1, f"image_size={image_size} is impossible: it must be at least 1.")
        require(fit in list(Fit), f"fit={fit} is none of {', '.join(Fit)}.")
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise UserError(
                f"mean={list(mean)} and std={list(std)} must have three values each, one per channel, and those of std "
                "must be greater than 0."
            )
        self.shape = (3, image_size, image_size)
        """Of a tensor."""
        self._mean, self._std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (mean, std))
        self._fit = Fit(fit)
        self._augment = augment

    def __call__(self, image: Image) -> Tensor:
        """Returns an RGB image as float32 `[3, image_size, image_size]`, `(pixel - mean) / std`."""
        size = self.shape[-1]
        if self._augment is None or not self._augment.crops:
            bilinear = pillow_image().Resampling.BILINEAR
            if self._fit is Fit.crop:
                from PIL import ImageOps

                image = ImageOps.fit(image, (size, size), bilinear)
            else:
                image = image.resize((size, size), bilinear)
        if self._augment is not None:
            image = self._augment(image, size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - self._mean) / self._std

"""Reads image files with Pillow."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from distaccum.errors import UserError, not_importable

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


def read_rgb(path: str, *, small: bool = False) -> Image:
    """Reads an image as RGB, turned as its EXIF orientation says. Transparency is dropped.

    Args:
        small: let the decoder scale a JPEG down, which reads all of the file in a part of the time.

    Raises:
        UserError: it can't be read, or has more than 8 bits per channel; names the file.
    """
    pillow = pillow_image()
    from PIL import ImageOps

    try:
        with pillow.open(path) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would clip them to 255, which turns nearly all of a 16-bit image white.
                raise ValueError(f"its pixels are of mode {image.mode}; convert them to 8 bits per channel")
            if small:
                image.draft("RGB", _SMALL)
            found: Image = ImageOps.exif_transpose(image).convert("RGB")
            return found
    except Exception as error:  # decoders raise all kinds of errors on a damaged file
        raise UserError(f"ImageFolder: {path} cannot be read as an image: {error}") from error

"""A photograph of coins and the mask of each pixel, from scikit-image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from distaccum.data.splits import EVALUATION, check_split
from distaccum.errors import UserError, not_importable

IGNORED = 255
"""Class of pixels that neither loss nor metrics count."""
FIRST_TRAINING_COLUMN = 128
"""Eight coins are held out, one of them cut by this line, and sixteen are trained on."""
_PATCHES_OVERLAP = 4
"""Training patches start in steps of their size divided by this."""


class Coins(Dataset[tuple[Tensor, Tensor]]):
    """Patches of a photograph of 24 Greek coins: background (0) or coin (1) for each pixel.

    The left third of the image, whose background is brighter, is held out: no pixel of it is in a patch to train on.
    Training patches overlap, and are flipped and turned at random (by torch's global generator, which the loader seeds
    for each sample). Held-out patches cover their part once; pixels beyond the image are ignored.

    The mask is the watershed of scikit-image's tutorial on these coins, without its specks and holes; its edges, one
    pixel to both sides, are ignored, as a human annotator's would be.

    A sample is an image, float32 `[1, size, size]` in [0, 1], and the classes, int64 `[size, size]`, where 255 means
    ignored.

    Source: scikit-image's `data.coins`, from the Brooklyn Museum's collection.

    Args:
        split: `train` or `evaluation`.
        patch_size: height and width of a patch.

    Raises:
        UserError: another split, an impossible size, or scikit-image is not installed.
    """

    num_classes = 2

    def __init__(self, split: str, patch_size: int = 64) -> None:
        check_split(split, type(self).__name__)
        pixels, mask = coins_and_mask()
        if not 1 <= patch_size <= min(len(pixels), pixels.shape[1] - FIRST_TRAINING_COLUMN):
            raise UserError(
                f"Coins: patch_size={patch_size} is impossible: it must be at least 1, and the part to train on "
                f"has {len(pixels)}×{pixels.shape[1] - FIRST_TRAINING_COLUMN} pixels."
            )
        self.input_shape = (1, patch_size, patch_size)
        self._augments = split != EVALUATION
        columns = slice(0, FIRST_TRAINING_COLUMN) if split == EVALUATION else slice(FIRST_TRAINING_COLUMN, None)
        pixels, mask = pixels[:, columns], mask[:, columns]
        if split == EVALUATION:
            pixels, mask = _extended(pixels, patch_size, 0.0), _extended(mask, patch_size, IGNORED)
        step = patch_size if split == EVALUATION else max(1, patch_size // _PATCHES_OVERLAP)
        self.images = _patches(pixels, patch_size, step).unsqueeze(1)
        self.masks = _patches(mask, patch_size, step)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.images[index], self.masks[index]
        if self._augments:
            turns, flipped = int(torch.randint(4, ())), bool(torch.randint(2, ()))
            image, mask = (torch.rot90(part, turns, (-2, -1)) for part in (image, mask))
            image, mask = (part.flip(-1) if flipped else part for part in (image, mask))
        return image.contiguous(), mask.contiguous()


def coins_and_mask() -> tuple[Tensor, Tensor]:
    """Returns the photograph, float32 `[303, 384]` in [0, 1], and its classes, int64 of the same shape.

    Raises:
        UserError: scikit-image is not installed.
    """
    try:
        import numpy as np
        from scipy.ndimage import binary_dilation, binary_erosion, binary_fill_holes, binary_opening
        from skimage.data import coins
        from skimage.filters import sobel
        from skimage.segmentation import watershed
    except (ImportError, MemoryError) as error:
        raise not_importable("Coins", "scikit-image", error) from error
    photograph = coins()
    markers = np.zeros(photograph.shape, dtype=np.int32)
    markers[photograph < 30] = 1  # surely background
    markers[photograph > 150] = 2  # surely a coin
    is_coin = binary_fill_holes(watershed(sobel(photograph), markers) == 2)
    is_coin = binary_opening(is_coin, np.ones((3, 3)), iterations=2)
    mask = is_coin.astype(np.int64)
    mask[binary_dilation(is_coin) & ~binary_erosion(is_coin)] = IGNORED
    return torch.from_numpy(photograph).float() / 255, torch.from_numpy(mask)


def _extended(values: Tensor, size: int, filling: float) -> Tensor:
    """Returns values with rows and columns added at the ends, to sides that are multiples of `size`."""
    below, right = (-side % size for side in values.shape)
    return F.pad(values, (0, right, 0, below), value=filling)


def _patches(values: Tensor, size: int, step: int) -> Tensor:
    """Returns squares `[N, size, size]`, at every `step`-th place and at the end of each side."""
    rows, columns = ({*range(0, side - size + 1, step), side - size} for side in values.shape)
    return torch.stack([values[r : r + size, c : c + size] for r in sorted(rows) for c in sorted(columns)])

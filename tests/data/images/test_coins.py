from __future__ import annotations

import sys

import pytest
import torch

from distaccum.data import Coins
from distaccum.data.images.coins import FIRST_TRAINING_COLUMN, IGNORED, coins_and_mask
from distaccum.errors import UserError


def test_samples() -> None:
    for split in ("train", "evaluation"):
        coins = Coins(split, patch_size=32)
        image, mask = coins[0]
        assert image.shape == coins.input_shape == (1, 32, 32)
        assert image.dtype == torch.float32
        assert 0 <= float(coins.images.min()) < float(coins.images.max()) <= 1
        assert mask.shape == (32, 32)
        assert mask.dtype == torch.int64
        assert {*coins.masks.unique().tolist()} == {0, 1, IGNORED}


def test_the_mask_has_24_coins_with_ignored_edges() -> None:
    from scipy.ndimage import label

    pixels, mask = coins_and_mask()
    assert pixels.shape == mask.shape == (303, 384)
    assert label(mask == 1)[1] == 24
    assert 0.02 < float((mask == IGNORED).float().mean()) < 0.1
    # Between a coin and the background there is always an edge that is ignored.
    across = (mask[:, 1:] - mask[:, :-1]).abs()
    assert not (across == 1).any()


def test_the_splits_are_disjoint_parts_of_the_photograph() -> None:
    pixels, mask = coins_and_mask()
    held_out = Coins("evaluation", patch_size=64)
    whole = held_out.images.view(5, 2, 64, 64).transpose(1, 2).reshape(320, 128)
    assert torch.equal(whole[:303], pixels[:, :FIRST_TRAINING_COLUMN])
    classes = held_out.masks.view(5, 2, 64, 64).transpose(1, 2).reshape(320, 128)
    assert torch.equal(classes[:303], mask[:, :FIRST_TRAINING_COLUMN])
    assert (classes[303:] == IGNORED).all(), "beyond the image nothing counts"
    train = Coins("train", patch_size=64)
    trained_on = pixels[:, FIRST_TRAINING_COLUMN:].unfold(0, 64, 1).unfold(1, 64, 1)
    assert torch.equal(train.images[0, 0], trained_on[0, 0])
    assert torch.equal(train.images[-1, 0], trained_on[-1, -1])


def test_training_patches_are_flipped_and_turned_together_with_their_masks() -> None:
    coins = Coins("train", patch_size=16)
    index = int((coins.masks == 1).flatten(1).float().mean(1).sub(0.5).abs().argmin())
    torch.manual_seed(0)
    drawn = [coins[index] for _ in range(40)]
    assert len({tuple(image.flatten().tolist()) for image, _ in drawn}) == 8
    # Mean brightness under the mask stays with it.
    means = {round(float(image[0][mask == 1].mean()), 4) for image, mask in drawn}
    assert len(means) == 1
    evaluation = Coins("evaluation", patch_size=16)
    assert torch.equal(evaluation[3][0], evaluation[3][0])


@pytest.mark.parametrize("size", [0, 400])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(UserError, match=f"patch_size={size} is impossible"):
        Coins("train", patch_size=size)


def test_another_split() -> None:
    with pytest.raises(UserError, match="Coins: split='test' is not known"):
        Coins("test")


def test_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(UserError, match=r"needs scikit-image.*pip install 'distaccum\[examples\]'"):
        Coins("train")

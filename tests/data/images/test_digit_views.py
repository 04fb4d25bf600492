from __future__ import annotations

import torch

from distaccum import WindowLoader
from distaccum.data import Digits, DigitViews
from distaccum.data.images.digits import random_views


def test_samples() -> None:
    views, label = DigitViews("train")[5]
    assert views.shape == (2, *DigitViews.input_shape)
    assert label == Digits("train").labels[5]
    assert len(DigitViews("evaluation")) == len(Digits("evaluation"))


def test_the_two_views_differ_and_resemble_their_digit() -> None:
    torch.manual_seed(0)
    digits = Digits("train")
    (first, second), _ = DigitViews("train")[0]
    assert not torch.equal(first, second)
    views = torch.stack([random_views(digits.images[i], 2)[0] for i in range(100)]).flatten(1)
    nearest = torch.cdist(views, digits.images[:100].flatten(1)).argmin(dim=1)
    assert (nearest == torch.arange(100)).float().mean() > 0.6


def test_any_cut_has_the_same_views() -> None:
    seen = []
    for micro_batch_size in (4, 16):
        loader = WindowLoader(DigitViews("train"), global_batch_size=16, micro_batch_size=micro_batch_size, seed=3)
        seen.append(torch.cat([views for views, _ in next(iter(loader))]))
    assert torch.equal(seen[0], seen[1])

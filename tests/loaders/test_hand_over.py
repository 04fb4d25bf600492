"""Micro-batches arrive from workers as the dataset has made them, however they are handed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loading import WITH_WORKERS, Numbers, new_source, requests

from distaccum.loaders.hand_over import MOST_BY_VALUE

pytestmark = WITH_WORKERS


class AllKinds(Numbers):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        whole = torch.arange(12.0).reshape(3, 4)
        return {
            "whole": whole,
            "itself": whole,
            "a row": whole[1],
            "turned": whole.T,
            "half": torch.full((3,), 1 / 3, dtype=torch.bfloat16),
            "none": torch.empty(0, 4, dtype=torch.int8),
            "a number": torch.tensor(index),
            "channels last": torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last),
            "for gradients": torch.ones(2, requires_grad=True),
            "shared": torch.ones(2).share_memory_(),
            "as large as may be": torch.full((MOST_BY_VALUE,), 7, dtype=torch.uint8),
            "larger": torch.full((MOST_BY_VALUE + 1,), 7, dtype=torch.uint8),
        }


@pytest.fixture(scope="module")
def batches() -> list[Any]:
    """Two micro-batches: the first one is kept while the second one arrives."""
    with new_source(AllKinds(), 1, collate_fn=lambda samples: samples[0]) as source:
        return list(source.batches(lambda: requests(2, size=1)))


def test_nothing_changes_on_the_way(batches: list[Any]) -> None:
    for number, batch in enumerate(batches):
        wanted = AllKinds()[number]
        for name, tensor in wanted.items():
            found = batch[name]
            assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
            assert name == "channels last" or torch.equal(found, tensor)
            assert found.requires_grad is tensor.requires_grad
        assert torch.equal(batch["turned"], batch["whole"].T)


def test_only_what_is_large_or_shared_already_is_in_shared_memory(batches: list[Any]) -> None:
    assert {name for name, tensor in batches[0].items() if tensor.is_shared()} == {"shared", "larger"}


def test_what_shares_memory_still_does(batches: list[Any]) -> None:
    first, second = batches
    first["whole"][1, 0] = 77.0
    assert first["itself"] is first["whole"]
    assert first["a row"][0] == first["turned"][0, 1] == 77.0
    assert second["whole"][1, 0] == 4.0

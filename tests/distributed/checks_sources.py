"""Each source of data, on real ranks: see `sources.assert_exact`. A new source is one more function here."""

from __future__ import annotations

from typing import Any

import pytest
from sources import COUNT, Source, assert_exact
from torch.utils.data import Dataset

from distaccum.runtime.world import World


def check_a_list(world: World) -> None:
    assert_exact(world, Source(open=lambda folder: [{"id": number} for number in range(COUNT)]))


class _Forwards(Dataset[Any]):
    """Gives its samples in their order, whichever is asked for: right in one process alone, without a restart."""

    def __init__(self) -> None:
        self._asked = -1

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, int]:
        self._asked += 1
        return {"id": self._asked % COUNT * (self._asked // COUNT * 2 + 1) % COUNT}


def check_a_sample_that_depends_on_what_was_asked_before(world: World) -> None:
    """The negative control."""
    with pytest.raises(AssertionError, match="2 ranks have other windows"):
        assert_exact(world, Source(open=lambda folder: _Forwards()))

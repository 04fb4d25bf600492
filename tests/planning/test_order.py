from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distaccum.planning import order, shuffled


@given(st.data(), st.integers(1, 2**40), st.integers(0, 2**31), st.integers(0, 100))
def test_few_positions_are_the_same_samples_as_among_many(
    data: st.DataObject, num_samples: int, seed: int, epoch: int
) -> None:
    positions = data.draw(st.lists(st.integers(0, num_samples - 1), max_size=order._FEW))
    many = np.resize(np.array([*positions, 0]), order._FEW + 1)
    found = shuffled(positions, num_samples, seed, epoch)
    assert found.dtype == np.int64
    assert found.tolist() == shuffled(many, num_samples, seed, epoch)[: len(positions)].tolist()

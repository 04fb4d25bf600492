from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distaccum.runtime import randomness as seeding
from distaccum.runtime.randomness import DrawDetector, GlobalStates, derived_seed, mixed_seed, seed_cpu

DRAWS: dict[str, Callable[[], Any]] = {
    "python": random.random,
    "python, one of a pair": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy, one of a pair": np.random.randn,
    "numpy, a pair": lambda: np.random.randn(2),
    "torch": lambda: torch.rand(()),
    "torch, normal": lambda: torch.randn(()),
    "a library seeded": lambda: torch.default_generator.manual_seed(1),
    # As many draws as the generator has words: its position is the same again.
    "python, all words": lambda: [random.getrandbits(32) for _ in range(624)],
    "numpy, all words": lambda: np.random.bytes(4 * 624),
}


def test_seeds_differ_by_purpose() -> None:
    assert derived_seed(1, "a", 2) == derived_seed(1, "a", 2)
    assert len({derived_seed(seed, name, number) for seed in (0, 1) for name in "ab" for number in range(50)}) == 200


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_mixed_seeds_are_64_bits_and_differ_in_both_halves(base: int, index: int) -> None:
    one, other = mixed_seed(base, index), mixed_seed(base, index + 1)
    assert 0 <= one < 2**64
    assert one >> 32 != other >> 32 or one % 2**32 != other % 2**32
    assert one == mixed_seed(base, index)


def test_mixed_seeds_are_the_output_of_splitmix64() -> None:
    # The published test vector, for seed 1234567: output k comes from the state 1234567 + k × 0x9E3779B97F4A7C15.
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [mixed_seed(1234567, step) for step in range(1, 6)] == wanted


def test_each_library_gets_numbers_of_its_own() -> None:
    seed_cpu(mixed_seed(3, 4))
    numbers = [random.random(), np.random.rand(), torch.rand((), dtype=torch.float64).item()]
    assert len(set(numbers)) == 3
    seed_cpu(mixed_seed(3, 4))
    # NumPy's and torch's first words, which one seed for both would make the same.
    assert int.from_bytes(np.random.bytes(4), "little") % 2**20 != int(torch.randint(2**20, ()))
    seed_cpu(mixed_seed(3, 4))
    assert [random.random(), np.random.rand(), torch.rand((), dtype=torch.float64).item()] == numbers


@pytest.mark.parametrize("by_peeking", [True, False])
@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_noticed_and_taken_back(name: str, by_peeking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seed_cpu(5)
    if not by_peeking:  # as with a Python whose generator lies in memory otherwise
        monkeypatch.setattr(seeding, "_python_memory", lambda: None)
    detector = DrawDetector()
    assert detector._peeks_python is by_peeking
    for _ in range(4):
        # What the training draws in between is not the question. It leaves one of a pair over each second time.
        random.random(), np.random.randn(), torch.rand(())
        states = detector.start()
        assert not detector.has_drawn()
        before = _next_numbers()
        DRAWS[name]()
        assert detector.has_drawn()
        states.put_back()
        assert not detector.has_drawn()
        assert _next_numbers() == before


def test_draws_from_another_numpy_generator_are_noticed() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        detector = DrawDetector()
        detector.start()
        assert not detector.has_drawn()
        np.random.rand()
        assert detector.has_drawn()
    finally:
        np.random.set_bit_generator(before)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 3))
def test_states_come_back_with_the_second_of_a_pair(seed: int, draws: int) -> None:
    seed_cpu(seed)
    for _ in range(draws):
        random.gauss(0, 1), np.random.randn(), torch.randn(())
    states = GlobalStates.now()
    first = [random.gauss(0, 1), np.random.randn(), torch.randn(()).item()]
    states.put_back()
    assert [random.gauss(0, 1), np.random.randn(), torch.randn(()).item()] == first


def test_a_context_restores_them() -> None:
    seed_cpu(1)
    with GlobalStates.now():
        wanted = torch.rand(()), random.random(), np.random.random()
    assert (torch.rand(()), random.random(), np.random.random()) == wanted


def _next_numbers() -> list[float]:
    """What each library would draw next; nothing is drawn."""
    states = GlobalStates.now()
    numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]
    states.put_back()
    return numbers

"""Finding the largest micro-batch that fits. Whole runs: `tests/distributed/test_auto_size_on_ranks.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from injection import Fragile, Vectors, task
from torch import nn

from distaccum import UserError, WindowLoader
from distaccum.runtime.memory import free_memory, is_out_of_memory
from distaccum.strategies import SingleStrategy
from distaccum.training.auto_micro_batch import Fitting, largest_that_fits


@given(st.integers(0, 500), st.integers(1, 500))
def test_the_search_ends_just_below_what_does_not_fit(limit: int, most: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest_that_fits(fits, most)
    assert found <= min(limit, most)
    assert found >= min(limit, most) - min(limit, most) // 16
    assert len(tried) == len(set(tried)) <= 14
    assert max(tried) <= max(2 * limit, 2)


def _fitting(module: Fragile, **more: Any) -> Fitting:
    module.double()
    loader = WindowLoader(Vectors(), global_batch_size=30, micro_batch_size=30)
    optimizer = torch.optim.AdamW(module.parameters())
    return Fitting(loader, SingleStrategy(module), task, optimizer, **more)  # type: ignore[arg-type]


def test_what_fits_is_found_and_nothing_of_the_search_stays() -> None:
    module = Fragile(counts=True)
    module.dropout = nn.Dropout(0.5)
    module.register_forward_hook(lambda module, _, output: module.dropout(output))
    module.faults.above(11, "backward", "middle")
    fitting = _fitting(module)
    before = torch.get_rng_state()
    assert fitting.samples() == 11
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert float(module.forwards) == 0
    assert module.faults.raised > 0


def test_more_than_a_share_of_the_window_is_never_tried() -> None:
    assert _fitting(Fragile()).samples() == 30


def test_memory_on_the_host_is_reckoned_with() -> None:
    """Twice the memory, twice the samples, beside what the model itself takes."""
    module = Fragile()
    parameters = sum(p.numel() * 8 for p in module.parameters())
    sizes = []
    for samples in (4, 8):
        fitting = _fitting(module)
        measured = fitting._measured(0, 2), fitting._measured(0, 8)
        for parameter in module.parameters():
            parameter.grad = None
        each = (measured[1] - measured[0]) / 6
        # AdamW's two moments come to it; gradients are there by then.
        room = 2 * parameters + (measured[0] - 2 * each) + (samples + 0.5) * each
        sizes.append(_fitting(module, memory_share=room / free_memory(torch.device("cpu"))).samples())
    # What is free changes a little from one moment to the next.
    assert sizes[0] in range(2, 7)
    assert sizes[1] in range(5, 12)


def test_sizes_that_may_not_fit_are_not_measured_where_ranks_would_wait() -> None:
    """Room for five samples: 8 would run out of memory, in the middle of a collective."""
    sizes: list[int] = []
    module = Fragile()
    module.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    module.faults.above(5, "forward", "end")
    fitting = _fitting(module)
    each = fitting._measured(0, 2) / 2
    room = (5.2 * each + fitting._bytes_to_come()) / free_memory(torch.device("cpu"))
    for parameter in module.parameters():
        parameter.grad = None
    sizes.clear()
    assert _fitting(module, memory_share=room)._reckoned(0, 30) in (4, 5)
    assert sizes == [2, 4]
    with pytest.raises(torch.OutOfMemoryError):
        _fitting(module)._reckoned(0, 30)


def test_not_even_one() -> None:
    module = Fragile()
    module.faults.above(0, "forward", "end")
    with pytest.raises(UserError, match=r"not even a single sample \(number \d+ of the training data, the costliest"):
        _fitting(module).samples()


def test_the_costliest_sample_is_the_longest() -> None:
    assert _fitting(Fragile(), lengths=Vectors().lengths)._costliest_sample() == 4


def test_other_errors_are_the_users_own() -> None:
    module = Fragile()
    module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _fitting(module).samples()


def test_which_errors_mean_that_memory_has_run_out() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))

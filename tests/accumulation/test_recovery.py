"""Going on when memory runs out, in one process. Ranks: `tests/distributed/checks_recovery.py`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from injection import Fragile, Vectors, task
from torch import nn

from distaccum import Accumulator, LoaderOptions, UpdateResult, UserError, WindowLoader
from distaccum.accumulation.recovery import Recovery
from distaccum.config import DPConfig
from distaccum.planning import EpochLengths
from distaccum.strategies import SingleStrategy, Strategy
from distaccum.strategies.dp import place_dp

POINTS = [
    *itertools.product(("forward",), ("begin", "middle", "end", "loss")),
    *itertools.product(("backward",), ("end", "middle", "begin")),
]
Strike = Callable[[Fragile, int], None]


class Trained:
    """What a short training was: results, parameters, sizes that it came down to."""

    def __init__(
        self,
        strike: Strike | None = None,
        *,
        updates: int = 4,
        counts: bool = False,
        place: Callable[[nn.Module], Strategy] = SingleStrategy,
        recovers: bool = True,
        optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.AdamW(parameters, lr=3e-2),
        **batch: Any,
    ) -> None:
        torch.manual_seed(3)
        self.module = Fragile(counts=counts).double()
        strategy = place(self.module)
        self.sizes: list[int] = []
        self.cuts: list[tuple[int, ...]] = []
        self.accumulator = Accumulator(
            strategy.model,
            optimizer(strategy.model.parameters()),
            clip_norm=1.0,
            strategy=strategy,
            recovery=Recovery(on_smaller=self.sizes.append) if recovers else None,
        )
        self.loader = WindowLoader(Vectors(), seed=1, **{"global_batch_size": 16, "micro_batch_size": 8, **batch})
        self.results: list[UpdateResult] = []
        try:
            while len(self.results) < updates:
                for window in self.loader:
                    if strike is not None:
                        strike(self.module, len(self.results) + 1)
                    self.results.append(self.accumulator.run(window, lambda batch: task(strategy.model, batch)))
                    assert window.sizes == tuple(map(len, window.sample_indices))
                    self.cuts.append(window.sizes)
                    if len(self.results) == updates:
                        break
        finally:
            self.loader.close()

    @property
    def curve(self) -> list[float]:
        numbers = [(result.loss, result.grad_norm, result.weight) for result in self.results]
        return [
            *itertools.chain.from_iterable(numbers),
            *(float(result.sums["correct"]) for result in self.results),
            *(float(p.detach().sum()) for p in self.module.parameters()),
        ]


def once(update: int, step: int, direction: str, point: str) -> Strike:
    def strike(module: Fragile, number: int) -> None:
        if number == update:
            module.faults.nth(step, direction, point)

    return strike


@pytest.fixture(scope="module")
def undisturbed() -> Trained:
    return Trained()


@pytest.mark.parametrize("counts", [False, True], ids=["plain", "buffers"])
@pytest.mark.parametrize(("direction", "point"), POINTS)
def test_every_point_of_a_window(undisturbed: Trained, direction: str, point: str, counts: bool) -> None:
    for step in (1, 2):
        found = Trained(once(2, step, direction, point), counts=counts)
        assert found.module.faults.raised == 1
        assert found.curve == pytest.approx(undisturbed.curve, rel=1e-12)
        assert found.sizes == [4]
        if counts:
            # The forwards that were taken back don't count.
            assert float(found.module.forwards) == sum(map(len, found.cuts))


def test_the_comparison_can_fail(undisturbed: Trained) -> None:
    def drop_a_gradient(module: Fragile, number: int) -> None:
        if number == 2:
            module.out.bias.grad = torch.full_like(module.out.bias, 1e-9)  # what a failed backward would leave behind

    assert Trained(drop_a_gradient).curve != pytest.approx(undisturbed.curve, rel=1e-12)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("workers", [0, 2])
def test_sizes_come_down_until_they_fit_and_stay_there(undisturbed: Trained, direction: str, workers: int) -> None:
    """Windows that workers have begun to load are cut anew when they come."""

    def shrink(module: Fragile, number: int) -> None:
        if number == 2:
            module.faults.above(3, direction, "middle")

    found = Trained(
        shrink, updates=6, options=LoaderOptions(num_workers=workers, prefetch_factor=3 if workers else None)
    )
    assert found.sizes == [4, 2]
    assert found.cuts[0] == (8, 8)
    assert all(size <= 3 for cut in found.cuts[1:] for size in cut)
    assert found.module.faults.raised == 2, "what is known not to fit is not tried again"
    assert found.curve[:3] == pytest.approx(undisturbed.curve[:3], rel=1e-12)
    assert found.curve == pytest.approx(Trained(updates=6).curve, rel=1e-12)
    assert found.loader.cuts.limit == 2


def test_micro_batches_by_length_keep_to_the_tokens_that_fit(undisturbed: Trained) -> None:
    by_length: dict[str, Any] = {"lengths": Vectors().lengths, "max_tokens": 20, "micro_batch_size": None}

    def shrink(module: Fragile, number: int) -> None:
        if number == 2:
            module.faults.above(3, "backward", "middle")

    found = Trained(shrink, **by_length)
    wanted = Trained(**by_length)
    assert found.curve == pytest.approx(wanted.curve, rel=1e-12)
    assert found.curve == pytest.approx(undisturbed.curve, rel=1e-12)
    assert max(map(max, wanted.cuts)) > 3 >= max(map(max, found.cuts[2:]))
    assert found.sizes == sorted(found.sizes, reverse=True)


def test_replicas_in_one_process(undisturbed: Trained) -> None:
    found = Trained(
        once(2, 1, "forward", "middle"), place=lambda module: place_dp(module, DPConfig(), torch.device("cpu"))
    )
    assert found.module.faults.raised == 1
    assert found.curve == pytest.approx(undisturbed.curve, rel=1e-12)


def test_a_single_sample_that_does_not_fit_is_named() -> None:
    def never(module: Fragile, _: int) -> None:
        module.faults.above(0, "forward", "end")

    with pytest.raises(
        UserError, match=r"update 1: out of memory in the forward of a single sample \(number \d+ of the"
    ):
        Trained(never)


def test_where_lengths_depend_on_the_epoch_the_samples_number_is_the_datasets() -> None:
    def in_the_third_epoch(module: Fragile, number: int) -> None:
        if number == 7:
            module.faults.above(0, "forward", "end")

    lengths = EpochLengths(lambda _, indices: 1 + indices % 5, len(Vectors()), longest=5)
    with pytest.raises(UserError, match=r"update 7: .* \(number (\d|[1-3]\d|4[0-3]) of the data\)"):
        Trained(in_the_third_epoch, updates=7, lengths=lengths, max_tokens=20, micro_batch_size=None)


def test_without_recovery_it_ends_with_what_was_asked_and_what_to_do() -> None:
    with pytest.raises(UserError) as raised:
        Trained(once(2, 2, "backward", "end"), recovers=False)
    assert "update 2: out of memory in the backward of a micro-batch of 8 samples: injected" in str(raised.value)
    assert "batch.micro_batch_size=auto" in str(raised.value)


def test_other_errors_are_the_users_own() -> None:
    def fail(module: Fragile, _: int) -> None:
        def strikes(*_: Any) -> bool:
            raise RuntimeError("shapes cannot be multiplied")

        module.faults.strikes = strikes

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Trained(fail)


def test_windows_that_cannot_be_cut_anew_are_refused() -> None:
    model = nn.Linear(2, 1)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), recovery=Recovery())
    with pytest.raises(UserError, match="needs the windows of a WindowLoader"):
        accumulator.run([torch.ones(3, 2)], lambda batch: task(model, (batch, batch)))


def test_a_signal_to_leave_passes_through(undisturbed: Trained) -> None:
    class LeaveError(Exception):
        pass

    def leave(module: Fragile, number: int) -> None:
        def strikes(*_: Any) -> bool:
            raise LeaveError

        if number == 2:
            module.faults.strikes = strikes

    with pytest.raises(LeaveError):
        Trained(leave)


class NoRoom(torch.optim.AdamW):
    """Has no memory for the state of its first parameter."""

    def _init_group(self, *_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room for exp_avg")


@pytest.mark.parametrize("recovers", [True, False])
def test_an_optimizer_that_can_not_step_ends_the_run(recovers: bool) -> None:
    with pytest.raises(UserError, match=r"out of memory in the optimizer's step: no room for exp_avg\."):
        Trained(optimizer=NoRoom, recovers=recovers)


def test_what_happened_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Trained(once(2, 1, "backward", "middle"))
    assert [record.getMessage() for record in caplog.records] == [
        "update 2: out of memory in the backward of 8 samples; micro-batches of this rank are at most 4 samples from "
        "here on"
    ]


def test_a_loaders_state_has_the_sizes_of_all_ranks() -> None:
    def loader() -> WindowLoader:
        made = WindowLoader(Vectors(), global_batch_size=16, micro_batch_size=8, rank=1, world_size=2)
        made.cuts.set_sizes([8, 5])
        return made

    first = loader()
    window = next(iter(first))
    assert window.sizes == (4, 4)
    assert first.cuts.forbid(window.sample_indices[0], now=window.number) == 2
    assert first.cuts.limits == (None, 2)
    second = loader()
    second.load_state_dict(first.state_dict())
    assert next(iter(second)).sizes == (2, 2, 2, 2)
    other = WindowLoader(Vectors(), global_batch_size=16, micro_batch_size=8, rank=1, world_size=4)
    other.cuts.set_sizes([4, 4, 4, 4])
    other.load_state_dict(first.state_dict())
    assert next(iter(other)).sizes == (4,), "sizes of other ranks say nothing"

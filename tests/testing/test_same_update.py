from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from distaccum.testing import UpdateDiffersError, assert_same_update

VOCABULARY, IGNORED = 11, -100
Built = tuple[nn.Module, torch.optim.Optimizer]
Step = Callable[[nn.Module, torch.optim.Optimizer, list[Any]], None]


def sentences(count: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(samples: list[Tensor]) -> Tensor:
    return pad_sequence(samples, batch_first=True, padding_value=IGNORED)


class Bigrams(nn.Module):
    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.between = nn.Sequential(*between)
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.between(self.embedding(tokens.clamp_min(0))))  # type: ignore[no-any-return]


def build(*between: nn.Module) -> Built:
    model = Bigrams(*between)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def summed(model: nn.Module, batch: Tensor) -> Tensor:
    targets = batch[:, 1:].flatten()
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")


def counted(batch: Tensor) -> int:
    return int((batch[:, 1:] != IGNORED).sum())


def exact(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Tensor]) -> None:
    total = sum(map(counted, micro_batches))
    for batch in micro_batches:
        (summed(model, batch) / total).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()


def loop(
    *,
    divisor: Callable[[list[Tensor], Tensor], float] = lambda batches, batch: counted(batch) * len(batches),
    clears: bool = False,
    clips: bool = False,
    steps: bool = False,
    drops: bool = False,
) -> Step:
    """Returns a loop with one or another common mistake."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Tensor]) -> None:
        if drops and len(micro_batches) > 1:
            micro_batches = micro_batches[:-1]
        for batch in micro_batches:
            if clears:
                optimizer.zero_grad()
            (summed(model, batch) / divisor(micro_batches, batch)).backward()
            if clips:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            if steps:
                optimizer.step()
        if not steps:
            optimizer.step()

    return step


def by_total(batches: list[Tensor], batch: Tensor) -> float:
    return sum(map(counted, batches))


def test_a_right_step_passes_to_rounding() -> None:
    assert_same_update(build, sentences(), exact, collate=padded, tolerance=1e-11)


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (loop(), "mean of means: the mean of each micro-batch counts alike"),
        (loop(divisor=lambda batches, batch: counted(batch)), "mean of means"),
        (loop(divisor=lambda batches, batch: by_total(batches, batch) / len(batches)), "2 times as large"),
        (loop(divisor=by_total, clears=True), "only the last micro-batch counts"),
        (loop(divisor=by_total, clips=True), "clipped or scaled in each"),
        (loop(divisor=by_total, steps=True), "the optimizer has stepped 2 times for one window"),
        (loop(divisor=by_total, drops=True), r"micro-batches \[1\] .* are left out"),
    ],
)
def test_a_wrong_step_fails_with_its_cause(step: Step, cause: str) -> None:
    with pytest.raises(UpdateDiffersError, match=cause) as caught:
        assert_same_update(build, sentences(), step, collate=padded)
    assert "window of 12 samples is cut (micro-batches of [6, 6] samples)" in str(caught.value)


def test_clipping_hides_no_wrong_factor() -> None:
    def clipped(divisor: Callable[[list[Tensor], Tensor], float], after: float, value: float | None = None) -> Step:
        """Divides by `divisor` in each micro-step and by `after` at the end, and clips then."""

        def step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Tensor]) -> None:
            for batch in micro_batches:
                (summed(model, batch) / divisor(micro_batches, batch)).backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad /= after
            if value is not None:
                nn.utils.clip_grad_value_(model.parameters(), value)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()

        return step

    def as_often(batches: list[Tensor], batch: Tensor) -> float:
        return by_total(batches, batch) / len(batches)

    for value in (None, 1e-9):
        with pytest.raises(UpdateDiffersError, match=r"before clipping is off") as caught:
            assert_same_update(build, sentences(), clipped(as_often, 3.0, value), collate=padded)
        assert "the gradient is 2 times as large (2 micro-batches on 1 rank(s))" in str(caught.value)
    by_the_end = clipped(lambda batches, batch: 1.0, 40.0)
    assert_same_update(build, sentences(), by_the_end, collate=padded, tolerance=1e-11)
    with pytest.raises(UpdateDiffersError, match="mean of means"):
        assert_same_update(build, sentences(), clipped(lambda batches, batch: counted(batch), 1.0), collate=padded)


def test_a_step_with_a_closure() -> None:
    def closed(step: Step) -> Step:
        def with_closure(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Any]) -> None:
            take = optimizer.step
            optimizer.step = lambda: None  # type: ignore[method-assign, assignment]
            take(lambda: step(model, optimizer, micro_batches))  # type: ignore[arg-type]

        return with_closure

    assert_same_update(build, sentences(), closed(loop(divisor=by_total)), collate=padded)
    with pytest.raises(UpdateDiffersError, match="mean of means"):
        assert_same_update(build, sentences(), closed(loop()), collate=padded)


def test_what_micro_batches_count_is_shown() -> None:
    with pytest.raises(UpdateDiffersError) as caught:
        assert_same_update(build, sentences(), loop(), collate=padded)
    first, second = (counted(padded(part)) for part in (sentences()[:6], sentences()[6:]))
    right = [share / (first + second) for share in (first, second)]
    assert f"count [0.5, 0.5] in the gradient, and should count [{right[0]:.3g}, {right[1]:.3g}]" in str(caught.value)


class Pooled(nn.Module):
    """Normalises over all positions of the micro-batch."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden - hidden.mean((0, 1))


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


def test_coupled_samples_are_told_from_wrong_weights() -> None:
    with pytest.raises(UpdateDiffersError, match=r"BatchNorm takes statistics of the micro-batch \(between.0.norm\)"):
        assert_same_update(lambda: build(Statistics()), sentences(), exact, collate=padded)
    with pytest.raises(UpdateDiffersError, match="couples the samples of a micro-batch"):
        assert_same_update(lambda: build(Pooled()), sentences(), exact, collate=padded)


def test_dropout_is_switched_off_and_other_noise_is_refused() -> None:
    assert_same_update(lambda: build(nn.Dropout(0.5)), sentences(), exact, collate=padded)

    class Noise(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + torch.randn_like(hidden)

    with pytest.raises(UpdateDiffersError, match="draw random numbers"):
        assert_same_update(lambda: build(Noise()), sentences(), exact, collate=padded)


def test_buffers_and_schedules_are_compared_too() -> None:
    class Counting(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, hidden: Tensor) -> Tensor:
            self.calls += 1
            return hidden

    with pytest.raises(UpdateDiffersError, match=r"but after the step .*: between.0.calls"):
        assert_same_update(lambda: build(Counting()), sentences(), exact, collate=padded)


def test_a_float32_model_is_converted_and_equal_cuts_can_be_asked_for() -> None:
    pairs = [(torch.randn(4), torch.randn(2)) for _ in range(8)]

    def linear() -> Built:
        model = nn.Linear(4, 2, dtype=torch.float32)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def mean_of_means(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Any]) -> None:
        for inputs, targets in micro_batches:
            (F.mse_loss(model(inputs), targets) / len(micro_batches)).backward()
        optimizer.step()

    assert_same_update(linear, pairs, mean_of_means, uneven=False, tolerance=1e-12)
    with pytest.raises(UpdateDiffersError, match="mean of means"):
        assert_same_update(linear, pairs, mean_of_means, tolerance=1e-12)


@contextmanager
def refused(what: str) -> Iterator[None]:
    with pytest.raises(ValueError, match=what):
        yield


def test_what_can_not_be_proved_is_said() -> None:
    with refused("1 samples can't be cut"):
        assert_same_update(build, sentences(1), exact, collate=padded)
    with refused("build must return the model and its optimizer"):
        assert_same_update(lambda: Bigrams(), sentences(), exact, collate=padded)  # type: ignore[arg-type, return-value]
    with refused("torch.optim.Optimizer, and has returned a int"):
        assert_same_update(lambda: (Bigrams(), 3), sentences(), exact, collate=padded)  # type: ignore[arg-type, return-value]
    with pytest.raises(UpdateDiffersError, match="has not stepped"):
        assert_same_update(build, sentences(), lambda model, optimizer, batches: None, collate=padded)
    assert torch.get_default_dtype() == torch.float32

"""The micro-steps' own gradients as they arrive: the norms are right, and the training is not touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distaccum import Accumulator, NoiseScale, UpdateResult, UserError, WindowLoader
from distaccum.accumulation.micro_gradients import MicroGradients
from distaccum.config import DPConfig
from distaccum.strategies import SingleStrategy, Strategy, place


class Distance(nn.Module):
    """½‖x − θ‖² for each sample: its gradient is θ − x, so G = θ − mean and tr Σ the variance of the data."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(width, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return 0.5 * (inputs - self.theta).square().sum(1)


class Cloud(torch.utils.data.Dataset[Tensor]):
    """Points around a centre; tr Σ / |G|² at θ = 0 is `true_scale`, where they are drawn without replacement too."""

    def __init__(self, num_samples: int = 4000, width: int = 10, centre: float = 0.4) -> None:
        generator = torch.Generator().manual_seed(7)
        self.points = centre + torch.randn(num_samples, width, generator=generator, dtype=torch.float64)
        variance = float(self.points.var(0, unbiased=True).sum())
        square = float(self.points.mean(0).square().sum()) - variance / num_samples
        self.true_scale = variance / square

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Tensor:
        return self.points[index]


def run(
    model: nn.Module,
    data: torch.utils.data.Dataset[Tensor],
    *,
    noise: NoiseScale | None,
    strategy: Strategy | None = None,
    updates: int = 100,
    lr: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    **batch: Any,
) -> list[UpdateResult]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    accumulator = Accumulator(
        (strategy or SingleStrategy(model)).model, optimizer, strategy=strategy, noise_scale=noise, scaler=scaler
    )
    loader = WindowLoader(data, **batch)
    results: list[UpdateResult] = []
    while len(results) < updates:
        for window in loader:
            with accumulator.window(window) as micro_batches:
                for micro_batch in micro_batches:
                    losses = accumulator.strategy.model(micro_batch)
                    accumulator.backward(losses.sum(), len(micro_batch))
            results.append(accumulator.step())
    return results


@pytest.mark.parametrize(
    "batch",
    [
        {"accumulation_steps": 1, "split_every": 1},
        {"accumulation_steps": 2},
        {"accumulation_steps": 3},
        {"micro_batch_size": 4},
        {"micro_batch_size": 2},
    ],
    ids=["one shot", "K=2", "K=3, unequal", "K=8", "K=16"],
)
def test_the_noise_scale_of_a_model_that_has_it_in_closed_form(batch: dict[str, Any]) -> None:
    """Ragged windows too: 4000 = 125 · 32, so a batch of 30 leaves the last window ten samples."""
    data = Cloud()
    for size in (32, 30):
        noise = NoiseScale(every_updates=1, smoothing=0.999)
        results = run(Distance(10), data, noise=noise, updates=400, global_batch_size=size, **batch)
        assert noise.scale == pytest.approx(data.true_scale, rel=0.1)
        assert abs(noise.scale - data.true_scale) < 3 * noise.error
        assert results[-1].noise_scale == noise.scale
        assert results[-1].noise_scale_error == noise.error < 0.1 * noise.scale


def test_linear_regression_in_closed_form() -> None:
    """½ (w·x − y)² with y = v·x + e: per-sample gradients x (x·d − e), d = w − v, of Gaussian x and e.

    G = d, and by Isserlis' theorem E‖g‖² = (n + 2) ‖d‖² + n s², where n is the width and s² the variance of e.
    """
    width, noise_std = 6, 0.5
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40000, width, generator=generator, dtype=torch.float64)
    true = torch.full((width,), 0.5, dtype=torch.float64)
    targets = inputs @ true + noise_std * torch.randn(40000, generator=generator, dtype=torch.float64)

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(width, dtype=torch.float64))

        def forward(self, batch: Tensor) -> Tensor:
            return 0.5 * (batch[:, :-1] @ self.weight - batch[:, -1]).square()

    data = torch.cat([inputs, targets[:, None]], dim=1)
    square = float(true.square().sum())
    variance = (width + 2) * square + width * noise_std**2 - square
    noise = NoiseScale(every_updates=1, smoothing=0.999)
    run(Squares(), data, noise=noise, updates=600, global_batch_size=64, micro_batch_size=9)  # type: ignore[arg-type]
    assert noise.scale == pytest.approx(variance / square, rel=0.1)


def test_replicas_in_one_process_are_measured_too() -> None:
    data = Cloud()
    model = Distance(10)
    noise = NoiseScale(every_updates=1, smoothing=0.999)
    strategy = place(model, DPConfig(replicas=2), torch.device("cpu"))
    run(model, data, noise=noise, strategy=strategy, updates=125, global_batch_size=32, micro_batch_size=8)
    assert noise.scale == pytest.approx(data.true_scale, rel=0.1)


class Tied(nn.Module):
    """A parameter that is used twice, one that is frozen, one that gets no gradient, and activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.shared = nn.Linear(10, 10)
        self.frozen = nn.Linear(10, 10).requires_grad_(False)
        self.unused = nn.Linear(10, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = checkpoint(self.shared, inputs.float(), use_reentrant=False)
        return self.shared(self.frozen(torch.tanh(hidden))).square().sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_each_micro_steps_own_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what a twin finds, which back-propagates each micro-batch alone."""
    monkeypatch.setattr("distaccum.accumulation.micro_gradients._HELD_BYTES", 100)  # in several batches
    model = Distance(10, dtype) if dtype is torch.bfloat16 else Tied()
    batches = [torch.randn(size, 10).to(dtype) for size in (3, 1, 4)]
    squares = []
    for batch in batches:
        model.zero_grad()
        model(batch).sum().backward()
        squares.append(sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None))
    model.zero_grad()
    watcher = MicroGradients(SingleStrategy(model), list(model.parameters()))
    with watcher:
        for batch in batches:
            watcher.begin(len(batch))
            model(batch).sum().backward()
        watcher.start(2.0)
    pieces, parts, samples, squared_sizes = watcher.seen().tolist()
    assert pieces == pytest.approx(0.25 * float(sum(squares)), rel=1e-5)
    assert (parts, samples, squared_sizes) == (3, 8, 26)
    model(batches[0]).sum().backward()
    watcher.start(1.0)
    assert watcher.seen()[0] == 4 * pieces, "hooks are gone when the window is over"


def test_a_gradient_that_comes_in_two_parts_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    class Reentrant(Tied):
        def forward(self, inputs: Tensor) -> Tensor:
            hidden = checkpoint(self.shared, inputs.float().requires_grad_(), use_reentrant=True)
            return self.shared(torch.tanh(hidden)).square().sum(1)

    noise = NoiseScale(every_updates=1)
    results = run(Reentrant(), Cloud(64), noise=noise, updates=2, global_batch_size=32, micro_batch_size=8)
    assert noise.measurements == 0
    assert results[-1].noise_scale is None
    assert "reentrant" in caplog.text


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize("every", [1, 3])
def test_no_bit_of_the_training_changes(every: int) -> None:
    found = []
    for noise in (None, NoiseScale(every_updates=every)):
        model = Tied()
        results = run(
            model,
            Cloud(100),
            noise=noise,
            updates=9,
            lr=0.01,
            global_batch_size=30,
            micro_batch_size=7,
            split_every=every,
        )
        found.append((_flat(model), [result.loss for result in results], [result.grad_norm for result in results]))
        measured = [number for number, result in enumerate(results, 1) if result.noise_scale is not None]
        assert measured == ([] if noise is None else list(range(every, len(results) + 1, every)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_the_scale_of_float16_gradients_is_taken_out() -> None:
    noises = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)):
        noise = NoiseScale(every_updates=1, smoothing=0.99)
        run(Distance(10), Cloud(640), noise=noise, scaler=scaler, updates=20, global_batch_size=32, micro_batch_size=8)
        noises.append((noise.scale, noise.gradient_square, noise.variance))
    assert noises[1] == pytest.approx(noises[0], rel=1e-9)


def test_an_update_that_is_skipped_is_no_measurement() -> None:
    model, noise = Distance(2), NoiseScale(every_updates=1)
    accumulator = Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), noise_scale=noise, skip_nonfinite=True
    )
    for factor, measured in ((1.0, 1), (math.nan, 1), (1.0, 2)):
        _window(accumulator, model, [factor * torch.ones(2, 2).double(), torch.ones(3, 2).double()], num_samples=True)
        assert noise.measurements == measured


def _window(accumulator: Accumulator, model: nn.Module, batches: Sequence[Tensor], num_samples: bool) -> UpdateResult:
    with accumulator.window(batches) as micro_batches:
        for batch in micro_batches:
            accumulator.backward(model(batch).sum(), len(batch), num_samples=len(batch) if num_samples else None)
    return accumulator.step()


def test_windows_that_do_not_count_their_samples_are_refused() -> None:
    model = Distance(2)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), noise_scale=NoiseScale())
    with pytest.raises(UserError, match="num_samples"):
        _window(accumulator, model, [torch.ones(2, 2).double()], num_samples=False)


def test_micro_batches_by_length_are_refused() -> None:
    with pytest.raises(UserError, match="by length"):
        run(Distance(10), Cloud(40), noise=NoiseScale(), updates=1, global_batch_size=8, lengths=[1] * 40)


def test_an_exception_in_a_window_leaves_no_hook_behind() -> None:
    model, noise = Distance(2), NoiseScale(every_updates=1)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), noise_scale=noise)
    with pytest.raises(ZeroDivisionError), accumulator.window([torch.ones(2, 2).double()] * 2):
        raise ZeroDivisionError
    assert not model.theta._backward_hooks
    _window(accumulator, model, [torch.ones(2, 2).double()] * 2, num_samples=True)
    assert noise.measurements == 1


def test_the_smoothing_is_a_part_of_the_accumulators_state() -> None:
    def fresh() -> tuple[nn.Module, Accumulator]:
        model = Distance(2)
        noise = NoiseScale(every_updates=1)
        return model, Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), noise_scale=noise)

    torch.manual_seed(0)
    batches = list(torch.randn(4, 3, 2, dtype=torch.float64) + 1)
    model, accumulator = fresh()
    for _ in range(3):
        _window(accumulator, model, batches, num_samples=True)
    twin, other = fresh()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(accumulator.state_dict())
    one, two = (_window(a, m, batches, num_samples=True) for m, a in ((model, accumulator), (twin, other)))
    assert (one.noise_scale, one.noise_scale_error) == (two.noise_scale, two.noise_scale_error)
    plain = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    plain.load_state_dict(accumulator.state_dict())  # one that doesn't measure goes on all the same
    other.load_state_dict(plain.state_dict())

"""Optimizers that evaluate the loss themselves, and functions that get the gradients, in one process.

What they compute, on real ranks too, is in tests/distributed/checks_closures.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from examples import replaced
from torch import Tensor, nn

from distaccum import Accumulator, NoiseScale, Recovery, TaskOutput, UserError, accumulate_coupled
from distaccum.accumulation import reevaluation
from distaccum.errors import NonfiniteError


class Twice(torch.optim.SGD):
    """Evaluates twice at the same parameters, and notes what it sees."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.seen: list[tuple[float, Tensor]] = []

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        for _ in range(2):
            loss = closure()
            gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
            self.seen.append((float(loss), torch.cat(gradients)))
        super().step()


class Wanders(Twice):
    """Evaluates where there is no loss."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.fill_(math.inf)
        closure()


class Never(Twice):
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        return


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.layers(inputs))


WINDOW = list(torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))


def _made(kind: type[torch.optim.Optimizer] = Twice, **options: Any) -> tuple[Accumulator, Any, Any]:
    model = Random()
    optimizer: Any = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    accumulator = Accumulator(model, optimizer, **options)
    return accumulator, optimizer, lambda batch: TaskOutput(model(batch).square().sum(), len(batch))


def _buffers(accumulator: Accumulator) -> list[Tensor]:
    return [buffer.clone() for buffer in accumulator.strategy.module.buffers()]


def test_each_evaluation_is_the_same_function_and_buffers_change_once() -> None:
    accumulator, optimizer, forward = _made()
    plain, _, plain_forward = _made(torch.optim.SGD)
    for number in range(2):
        torch.manual_seed(number)
        result = accumulator.run(WINDOW, forward)
        after = torch.get_rng_state()
        torch.manual_seed(number)
        plain_result = plain.run(WINDOW, plain_forward)
        assert (result.evaluations, plain_result.evaluations) == (2, 1)
        assert (result.loss, result.grad_norm, result.micro_steps) == (plain_result.loss, plain_result.grad_norm, 3)
        # As if the window had been taken once: BatchNorm's statistics, and the next random numbers.
        for mine, wanted in zip(_buffers(accumulator), _buffers(plain), strict=True):
            assert torch.equal(mine, wanted)
        assert torch.equal(after, torch.get_rng_state())
        (first, gradient), (second, again) = optimizer.seen[-2:]
        assert first == second == result.loss
        assert torch.equal(gradient, again)
    assert accumulator.updates == 2
    assert all(p.grad is None for p in accumulator.strategy.module.parameters())
    # Without putting back what a forward changes, the two would differ.
    with replaced(reevaluation._State, "put_back", lambda self: None):
        accumulator.run(WINDOW, forward)
    assert optimizer.seen[-2][0] != optimizer.seen[-1][0]


def test_micro_batches_are_loaded_once() -> None:
    taken = []

    def stream() -> Iterator[Tensor]:
        for batch in WINDOW:
            taken.append(batch)
            yield batch

    accumulator, optimizer, forward = _made()
    torch.manual_seed(0)
    accumulator.run(stream(), forward)
    assert len(taken) == 3
    again, listed, forward = _made()
    torch.manual_seed(0)
    again.run(WINDOW, forward)
    assert [loss for loss, _ in listed.seen] == [loss for loss, _ in optimizer.seen]


def test_what_begins_is_told() -> None:
    said: list[tuple[str, int]] = []
    accumulator, _, forward = _made()
    accumulator.run(WINDOW, forward, lambda what, number, _: said.append((what, number)))
    assert said.count(("evaluation", 2)) == 1
    assert said.count(("step", 3)) == 2
    assert said.index(("evaluation", 2)) == len(said) // 2


def test_a_window_opened_by_hand_is_refused() -> None:
    accumulator, _, forward = _made()
    with pytest.raises(UserError, match=r"Twice evaluates the loss of a window itself.*accumulator\.run\(window, forw"):
        accumulator.window(WINDOW).__enter__()
    with pytest.raises(UserError, match=r"gradient caching makes updates of one gradient; Twice evaluates"):
        accumulate_coupled(accumulator, WINDOW, embed=accumulator.strategy.model, loss=forward)
    assert accumulator.run(WINDOW, forward).evaluations == 2


def test_what_an_update_of_several_gradients_cannot_have_is_refused() -> None:
    refused: dict[str, dict[str, Any]] = {
        "scaler .precision=fp16.": {"scaler": torch.amp.GradScaler("cpu")},
        "train.on_nonfinite=skip": {"skip_nonfinite": True},
        "batch.micro_batch_size=auto": {"recovery": Recovery()},
        "insight.noise_scale": {"noise_scale": NoiseScale()},
    }
    for what, options in refused.items():
        with pytest.raises(UserError, match=f"Twice evaluates the loss itself, which does not support .*{what}"):
            _made(**options)
    model = nn.Linear(2, 1).bfloat16()
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    with pytest.raises(UserError, match="bf16_params"):
        Accumulator(model, Twice(model.parameters()))
    with pytest.raises(UserError, match=r"LBFGS .*learns the curvature.*train\.clip_norm=null"):
        Accumulator(model, torch.optim.LBFGS(model.parameters()), clip_norm=1.0)


def test_errors_say_in_which_evaluation() -> None:
    accumulator, _, forward = _made(Wanders)
    with pytest.raises(
        NonfiniteError, match=r"update 1: the loss is nan .*evaluation 2 of the window, at parameters that"
    ):
        accumulator.run(WINDOW, forward)
    accumulator, _, forward = _made()
    with pytest.raises(NonfiniteError, match="The parameters have not moved"):
        accumulator.run([batch * math.inf for batch in WINDOW], forward)
    assert accumulator.run(WINDOW, forward).evaluations == 2  # the next window starts clean
    accumulator, _, forward = _made(Never)
    with pytest.raises(UserError, match=r"Never\.step\(closure\) has not called its closure"):
        accumulator.run(WINDOW, forward)


# on_gradients


def test_a_function_that_only_looks_changes_nothing_but_rounding() -> None:
    names: list[list[str]] = []
    found = []
    for hook in (None, lambda named: names.append(list(named))):
        accumulator, _, forward = _made(torch.optim.SGD, clip_norm=0.1, on_gradients=hook)
        torch.manual_seed(0)
        result = accumulator.run(WINDOW, forward)
        found.append((result.grad_norm, torch.cat([p.detach().flatten() for p in accumulator._model.parameters()])))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-14, atol=0)
    assert names == [[name for name, _ in Random().named_parameters()]]


def test_gradients_that_a_function_spoils_are_refused_before_the_step() -> None:
    def spoil(named: Mapping[str, Tensor]) -> None:
        named["layers.0.weight"].div_(0)

    accumulator, _, forward = _made(torch.optim.SGD, on_gradients=spoil)
    before = [p.detach().clone() for p in accumulator.strategy.module.parameters()]
    with pytest.raises(NonfiniteError, match="on_gradients has left gradients whose norm is"):
        accumulator.run(WINDOW, forward)
    assert all(torch.equal(p, was) for p, was in zip(accumulator.strategy.module.parameters(), before, strict=True))

    def replace(named: Any) -> None:
        named["layers.0.weight"] = torch.zeros(())

    accumulator, _, forward = _made(torch.optim.SGD, on_gradients=replace)
    with pytest.raises(TypeError, match="does not support item assignment"):
        accumulator.run(WINDOW, forward)


def test_no_function_is_called_in_a_skipped_update() -> None:
    seen: list[object] = []
    accumulator, _, forward = _made(torch.optim.SGD, on_gradients=seen.append, skip_nonfinite=True)
    assert accumulator.run([batch * math.inf for batch in WINDOW], forward).skipped
    assert not seen

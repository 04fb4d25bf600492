"""A window that is left between two micro-steps and gone on with by another accumulator, in one process.

Ranks and whole runs: `tests/faults/test_unfinished_windows.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from injection import Fragile, Vectors, task
from torch import Tensor, nn

from distaccum import Accumulator, LoaderOptions, NoiseScale, TaskOutput, UpdateResult, UserError, WindowLoader
from distaccum.accumulation.recovery import Recovery
from distaccum.accumulation.unfinished import is_of

STEPS = 8


class LeftError(Exception):
    pass


class Part:
    """Trains two updates of 8 micro-steps, or goes on with what another one has left of the second.

    Args:
        leave_at: micro-step of the second window before which it is left.
        before: what is gone on with.
        change: is called with what was taken out, before that is gone on with.
        left_out: micro-batches that the loader leaves out, if not those.
    """

    def __init__(
        self,
        leave_at: int | None = None,
        before: Part | None = None,
        *,
        change: Callable[[dict[str, Tensor]], None] = lambda state: None,
        recovers: bool = False,
        workers: int = 0,
        left_out: int | None = None,
        is_tensor: bool = False,
        **more: Any,
    ) -> None:
        torch.manual_seed(3)
        self.is_tensor, self.leave_at = is_tensor, leave_at
        self.module = Fragile(counts=True).double()
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=3e-2)
        more |= {"recovery": Recovery()} if recovers else {}
        self.accumulator = Accumulator(self.module, optimizer, clip_norm=1.0, **more)
        options = LoaderOptions(num_workers=workers)
        self.loader = WindowLoader(Vectors(), seed=1, global_batch_size=2 * STEPS, micro_batch_size=2, options=options)
        self.results: list[UpdateResult] = []
        self.state: dict[str, Tensor] = {}
        done = 0
        if before is not None:
            saved, of_optimizer, of_accumulator = before.saved
            self.module.load_state_dict(saved)
            optimizer.load_state_dict(of_optimizer)
            self.accumulator.load_state_dict(of_accumulator)
            state = {name: value.clone() for name, value in before.state.items()}
            change(state)
            assert is_of(state, self.loader.cuts.micro_batches(0, 1))
            self.accumulator.unfinished, done = state, len(state["sizes"])
            torch.manual_seed(99)
        self._train(done if left_out is None else left_out)

    def _train(self, done: int) -> None:
        try:
            for window in self.loader.epoch(0, 1 if self.accumulator.updates else 0, done):
                self.saved = copy.deepcopy(
                    (self.module.state_dict(), self.accumulator.optimizer.state_dict(), self.accumulator.state_dict())
                )
                self.results.append(self.accumulator.run(window, self._forward, self._tell))
                if window.index == 1:
                    return
        except LeftError:
            assert self.accumulator.updates == 1
        finally:
            self.loader.close()

    def _forward(self, batch: Any) -> TaskOutput:
        inputs, targets = batch
        output = task(self.module, (inputs + 0.1 * torch.randn_like(inputs), targets))
        output.weight = torch.tensor(len(targets)) if self.is_tensor else len(targets)
        return output

    def _tell(self, phase: str, micro_step: int, is_last: bool) -> None:
        if phase == "forward" and self.accumulator.updates == 1 and micro_step == self.leave_at:
            self.state = self.accumulator.take_out()
            raise LeftError

    @property
    def outcome(self) -> tuple[Any, ...]:
        end = self.results[-1]
        numbers = end.loss, end.weight, end.grad_norm, end.micro_steps, float(end.sums["correct"])
        return *numbers, *(value.tolist() for value in self.module.state_dict().values())


@pytest.fixture(scope="module")
def undisturbed() -> Part:
    return Part()


@pytest.mark.parametrize("settings", [{}, {"workers": 1}, {"is_tensor": True}, {"recovers": True}], ids=str)
def test_going_on_is_bit_for_bit(undisturbed: Part, settings: dict[str, Any]) -> None:
    for leave_at in (2, 5, STEPS):
        left = Part(leave_at, **settings)
        assert len(left.state["sizes"]) == leave_at - 1
        forwards = left.module.forwards.item() if settings else 0
        found = Part(before=left, **settings)
        assert found.outcome == undisturbed.outcome
        assert found.results[-1].seconds > float(left.state["seconds"][0])
        assert not forwards or forwards == STEPS + leave_at - 1


@pytest.mark.parametrize(
    "name", ["gradients/out.bias", "random/torch", "loss_sums", "sums/correct", "buffers/forwards"]
)
def test_all_of_it_counts(undisturbed: Part, name: str) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state[name].copy_(torch.zeros_like(state[name]) if name != "random/torch" else torch.get_rng_state())

    assert Part(before=Part(4), change=change).outcome != undisturbed.outcome


def test_memory_that_runs_out_afterwards_begins_the_window_again(undisturbed: Part) -> None:
    """The micro-steps of the other process too: all of the rank's samples are taken anew, in smaller pieces."""

    class Struck(Part):
        def _forward(self, batch: Any) -> TaskOutput:
            if not self.module.faults.raised and self.accumulator._open is not None and self.accumulator.updates == 1:
                self.module.faults.above(1, "backward", "middle")
            return super()._forward(batch)

    found = Struck(before=Part(4, recovers=True), recovers=True)
    assert found.module.faults.raised == 1
    assert found.results[-1].weight == 2 * STEPS
    assert found.results[-1].micro_steps == 2 * STEPS, "of one sample each"
    assert float(found.module.forwards) == 3 * STEPS, "those of the first part are taken back"


def test_what_cannot_be_gone_on_with_is_not_taken_out() -> None:
    assert Part(4, noise_scale=NoiseScale(every_updates=1)).state == {}
    assert Part(4, weights=lambda batch: {"main": len(batch[1])}).state == {}
    model = nn.Linear(6, 3).double()
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert accumulator.take_out() == {}, "no window is open"
    batches = [(torch.ones(2, 6, dtype=torch.float64), torch.tensor([0, 1]))] * 3
    with accumulator.window(batches) as micro_batches:
        for inputs, targets in micro_batches:
            assert accumulator.take_out() == {}, "whose samples are not known"
            accumulator.backward(nn.functional.cross_entropy(model(inputs), targets, reduction="sum"), len(targets))


def test_another_scale_or_model_is_refused() -> None:
    left = Part(4)
    with pytest.raises(UserError, match=r"update 2: .* can't be gone on with \(losses were multiplied by 1, here by"):
        Part(before=left, change=lambda state: state["scale"].fill_(1.0))
    with pytest.raises(UserError, match=r"can't be gone on with \('out.other'\)"):
        Part(before=left, change=lambda state: state.update({"gradients/out.other": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"out.bias is torch.float64 \[1\], here torch.float64 \[3\]"):
        Part(before=left, change=lambda state: state.update({"gradients/out.bias": state["loss_sums"][:1]}))
    with pytest.raises(AssertionError, match="is_of"):
        Part(before=left, change=lambda state: state["samples"].add_(1))


@pytest.mark.parametrize("recovers", [False, True])
def test_a_loader_that_leaves_out_other_micro_batches_is_refused(recovers: bool) -> None:
    left = Part(4, recovers=recovers)
    for left_out in (0, 2, 5):
        said = f"update 2: its window leaves out its first {left_out} micro-batches, .* holds the gradients of 3"
        with pytest.raises(UserError, match=said):
            Part(before=left, left_out=left_out, recovers=recovers)
    without = Part(recovers=recovers)
    with pytest.raises(UserError, match=r"update 3: .* its first 3 micro-batches, .* holds the gradients of 0"):
        without._train(3)

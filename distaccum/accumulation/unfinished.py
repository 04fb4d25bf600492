"""Takes out of a window what a rank has accumulated, between two micro-steps, to go on with in another process.

Gradients cross the network in a window's last micro-step alone. What comes before it is each rank's own, so ranks may
leave a window at different micro-steps, and each goes on at its own.

    samples, sizes              dataset indices of the micro-batches that are done, end to end, and how many each has
    gradients/<parameter>       as they have accumulated: sums, in their own format, multiplied by `scale`
    loss_sums, weights          of each micro-step; `weight_numbers` where weights are Python's numbers
    sums/<name>                 over these micro-steps
    random/, buffers/, strategy/    as the micro-steps have left them
    scale, seconds              what losses were multiplied by; time taken so far, and the part of it spent on data
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distaccum.accumulation.open_window import OpenWindow
from distaccum.accumulation.running_sum import RunningSum
from distaccum.accumulation.scalars import stacked
from distaccum.errors import UserError, require
from distaccum.loaders import Window
from distaccum.runtime.buffers import persistent_buffers
from distaccum.runtime.randomness import random_state, set_random_state

State = dict[str, Tensor]
"""Tensors on the CPU, by the names above."""


def taken_out(window: OpenWindow) -> State:
    """Returns copies of what a window has accumulated; empty if that can't be gone on with.

    That is so for windows that aren't a `WindowLoader`'s, with several losses or in which the noise scale is measured,
    and if the micro-steps' sums differ in their names.
    """
    done, source = len(window.loss_sums), window.source
    numbers = [weight for weight in window.weights if not isinstance(weight, Tensor)]
    is_known = isinstance(source, Window) and window.terms is None and window.micro_gradients is None
    is_uniform = len(numbers) in (0, done) and all(s.count == done and len(s.shapes) == 1 for s in window.sums.values())
    if not done or not is_known or not is_uniform:
        return {}
    assert isinstance(source, Window)
    strategy = window.strategy
    pieces = (window.share.taken if window.share is not None else source.sample_indices)[:done]
    state = {f"gradients/{n}": p.grad for n, p in window.gradients.named().items() if p.grad is not None}
    state |= {f"sums/{name}": value.total for name, value in window.sums.items()}
    state |= {f"random/{name}": value for name, value in random_state(strategy.device).items()}
    state |= {f"buffers/{name}": value for name, value in persistent_buffers(strategy.module)}
    state |= {f"strategy/{name}": value for name, value in strategy.state_tensors().items()}
    state["loss_sums"] = stacked(window.loss_sums, strategy.device)
    if numbers:
        state["weight_numbers"] = torch.tensor(numbers, dtype=torch.float64)
    else:
        state["weights"] = stacked([w for w in window.weights if isinstance(w, Tensor)], strategy.device)
    state["samples"] = torch.tensor([sample for piece in pieces for sample in piece], dtype=torch.int64)
    state["sizes"] = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    state["scale"] = torch.tensor(_scale(window), dtype=torch.float64)
    state["seconds"] = torch.tensor([window.seconds(), window.data_seconds], dtype=torch.float64)
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def is_of(state: Mapping[str, Tensor], pieces: Sequence[Sequence[int]]) -> bool:
    """Whether what was accumulated is of the first ones of a rank's micro-batches, by their dataset indices."""
    done = len(state["sizes"])
    first = pieces[:done]
    return (
        done < len(pieces)
        and state["sizes"].tolist() == [len(piece) for piece in first]
        and state["samples"].tolist() == [sample for piece in first for sample in piece]
    )


def put_in(window: OpenWindow, state: Mapping[str, Tensor]) -> State:
    """Goes on with a window where it was left; returns what is left of the state, nothing.

    All ranks call it, before the first micro-step in this process. Does nothing if there is no state, or the window has
    been begun again as its micro-batches are too large by now.

    Raises:
        UserError: the state is of another model, its losses had another scale, or the window leaves out other
            micro-batches than those whose gradients it holds.
    """
    is_again = window.share is not None and not window.share.taken
    left_out = window.source.done if isinstance(window.source, Window) else 0
    done = len(state["sizes"]) if state else 0
    require(
        left_out == done or (is_again and not state),
        f"update {window.number}: its window leaves out its first {left_out} micro-batches, and accumulator.unfinished "
        f"holds the gradients of {done}. Give both: accumulator.unfinished = state, and "
        'loader.epoch(epoch, first_window, done=len(state["sizes"])).',
    )
    if not state or is_again:
        return {}
    strategy = window.strategy
    strategy.begin_window()  # else the first forward would replace the ranks' buffers by rank 0's
    try:
        with torch.no_grad():
            _put_in(window, state)
        if of_strategy := _below(state, "strategy/"):
            strategy.load_state_tensors(of_strategy)
        set_random_state(_below(state, "random/"), strategy.device)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"update {window.number}: what the checkpoint holds of its window can't be gone on with ({error}). Go on "
            "from the checkpoint before."
        ) from error
    return {}


def _scale(window: OpenWindow) -> float:
    """Returns what losses are multiplied by, that of the scaler included."""
    return window.scale * (window.scaler.get_scale() if window.scaler is not None else 1.0)


def _put_in(window: OpenWindow, state: Mapping[str, Tensor]) -> None:
    if (before := float(state["scale"])) != (scale := _scale(window)):
        raise ValueError(f"losses were multiplied by {before:g}, here by {scale:g}")
    device, parameters = window.strategy.device, window.gradients.named()
    for name, gradient in _below(state, "gradients/").items():
        parameter = parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter, dtype=gradient.dtype)
        parameter.grad.copy_(_like(gradient, parameter.grad, name))
    buffers = dict(persistent_buffers(window.strategy.module))
    for name, value in _below(state, "buffers/").items():
        buffers[name].copy_(_like(value, buffers[name], name))
    window.micro_steps = len(state["sizes"])
    window.loss_sums = list(state["loss_sums"].to(device).unbind())
    numbers = state.get("weight_numbers")
    window.weights = numbers.tolist() if numbers is not None else list(state["weights"].to(device).unbind())
    window.sums = {name: RunningSum(total.to(device)) for name, total in _below(state, "sums/").items()}
    for entry in window.sums.values():
        entry.count = window.micro_steps
    seconds, data_seconds = state["seconds"].tolist()
    window.started -= seconds
    window.data_seconds += data_seconds
    if not len(window.loss_sums) == len(window.weights) == window.micro_steps:
        raise ValueError("its micro-steps are not equally many")


def _like(value: Tensor, wanted: Tensor, name: str) -> Tensor:
    if (value.shape, value.dtype) != (wanted.shape, wanted.dtype):
        raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, here {wanted.dtype} {list(wanted.shape)}")
    return value


def _below(state: Mapping[str, Tensor], prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

"""Updates of optimizers that evaluate the loss themselves, as often as they ask: L-BFGS, SAM.

Their `step(closure)` calls a closure that leaves the gradient in `.grad` and returns the loss. Here the closure is the
whole window: all of its micro-steps, one sync, the factor to the mean, clipping. So each evaluation is that of the
window in one shot, on any ranks and in any cut, and all ranks see the same loss and gradient.

A window is then a function of the parameters, the same in each evaluation: its micro-batches are loaded once and kept
on the host, and each evaluation begins with the random states (of Python's, NumPy's and torch's global generators) and
the buffers that the first one began with. Afterwards both are as the first evaluation has left them, so that
BatchNorm's statistics change once an update, by the parameters that it began with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.accumulation.noise_scale import NoiseScale
from distaccum.accumulation.recovery import Recovery, Tell
from distaccum.accumulation.result import UpdateResult
from distaccum.errors import NonfiniteError, UserError, require
from distaccum.loaders import Window
from distaccum.runtime.buffers import KeptBuffers
from distaccum.runtime.nested import mapped, tensors_of
from distaccum.runtime.randomness import GlobalStates
from distaccum.strategies import Strategy
from distaccum.strategies.optimizers import takes_closure

Attempt = Callable[[Iterable[Any]], UpdateResult | None]
"""Takes all micro-steps of a window, and leaves its mean gradient in place."""


def reevaluation_of(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    strategy: Strategy,
    clip_norm: float | None,
    scaler: torch.amp.GradScaler | None,
    skip_nonfinite: bool,
    recovery: Recovery | None,
    noise_scale: NoiseScale | None,
) -> Reevaluation | None:
    """Returns how the optimizer's updates are made if it evaluates the loss itself; None if it doesn't.

    Raises:
        UserError: it does, and the accumulator was given what only an update of one gradient can have.
    """
    if not takes_closure(optimizer):
        return None
    name = type(optimizer).__name__
    if clip_norm is not None and isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(
            f"{name} (optim=lbfgs) learns the curvature from differences of gradients, and clipped ones differ by the "
            "clipping too. Leave clip_norm and clip_value out (train.clip_norm=null)."
        )
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    has_wide = any((getattr(entry, "grad_dtype", None) or entry.dtype) != entry.dtype for entry in every)
    refused = {
        "a gradient scaler (precision=fp16)": (scaler, "it steps or skips by one gradient. Use precision=bf16"),
        "gradients wider than their parameters (precision=bf16_params)": (
            has_wide,
            "it reads them between evaluations. Use precision=bf16",
        ),
        "skip_nonfinite (train.on_nonfinite=skip)": (
            skip_nonfinite,
            "an update can't be skipped once the parameters have moved. Leave it out",
        ),
        "recovery (batch.micro_batch_size=auto)": (
            recovery,
            "the micro-batches of a window are kept for its evaluations, so they can't be cut anew. Give a size",
        ),
        "noise_scale (insight.noise_scale)": (
            noise_scale,
            "it is that of one gradient, and an update here has several, at other parameters. Leave it out",
        ),
    }
    for what, (given, why) in refused.items():
        if given:
            raise UserError(f"{name} evaluates the loss itself, which does not support {what}: {why}.")
    return Reevaluation(optimizer, model, strategy)


class Reevaluation:
    """Makes updates of an optimizer that evaluates the loss itself."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, strategy: Strategy) -> None:
        self._optimizer = optimizer
        self._model = model
        self._strategy = strategy
        self._is_running = False

    def require_running(self) -> None:
        """Refuses a window that is opened by hand.

        Raises:
            UserError: it is.
        """
        name = type(self._optimizer).__name__
        require(
            self._is_running,
            f"{name} evaluates the loss of a window itself, as often as it asks, and a window opened by hand is taken "
            "once. Call accumulator.run(window, forward), with a function of a micro-batch that returns a TaskOutput.",
        )

    def run(
        self, micro_batches: Iterable[Any], attempt: Attempt, clear: Callable[[], None], tell: Tell
    ) -> UpdateResult:
        """Steps the optimizer over one window.

        Args:
            clear: drops the gradients.
            tell: as for `Accumulator.run`.

        Returns:
            The result of the first evaluation, at the parameters that the update began with, with the number of
            evaluations; seconds and traffic are those of all of them.

        Raises:
            UserError: as `attempt`; or the optimizer hasn't called its closure, or its line search can't begin.
        """
        started, name = time.perf_counter(), type(self._optimizer).__name__
        _require_searchable(self._optimizer)
        window = _Held(micro_batches)
        results: list[UpdateResult] = []
        before = after = _State(self._model, self._strategy)

        @torch.enable_grad()
        def closure() -> Tensor:
            nonlocal after
            clear()
            if results:
                before.put_back()
                tell("evaluation", len(results) + 1, False)
            try:
                result = attempt(window.micro_batches())
            except NonfiniteError as error:
                if not results:
                    raise
                said = str(error).partition(". The parameters have not moved")[0]
                raise NonfiniteError(
                    f"{said}. That is evaluation {len(results) + 1} of the window, at parameters that {name} tries: "
                    "go on from a checkpoint with a lower learning rate, or with a line search where it has one."
                ) from error
            assert result is not None  # only recovery has a window taken again
            results.append(result)
            if len(results) == 1:
                after = _State(self._model, self._strategy)
            return torch.tensor(result.loss, dtype=torch.float64)

        self._is_running = True
        try:
            self._optimizer.step(closure)  # type: ignore[arg-type]
        finally:
            self._is_running = False
            clear()
        require(bool(results), f"{name}.step(closure) has not called its closure, so the window has no loss.")
        after.put_back()
        return replace(
            results[0],
            evaluations=len(results),
            flags=frozenset().union(*(result.flags for result in results)),
            seconds=time.perf_counter() - started,
            **{key: sum(getattr(result, key) for result in results) for key in _ADDED_UP},
        )


def _require_searchable(optimizer: torch.optim.Optimizer) -> None:
    """Refuses a line search from a learning rate of 0, by which torch's divides."""
    require(
        all(group["lr"] for group in optimizer.param_groups if group.get("line_search_fn")),
        f"{type(optimizer).__name__} searches for the length of its step from the learning rate on, which is 0 in this "
        "update. Give a learning rate, and a schedule, that stay above 0, or leave the line search out.",
    )


_ADDED_UP = ("sync_calls", "sync_bytes", "data_seconds", "sync_seconds")


def random_states(strategy: Strategy) -> GlobalStates:
    """Returns the states of all global generators that a forward on this rank may draw from."""
    model = strategy.model
    return GlobalStates.now(*(model.device_ids if isinstance(model, nn.DataParallel) else [strategy.device]))


class _State:
    """Keeps what an evaluation's forwards depend on and change besides gradients: random states and buffers."""

    def __init__(self, model: nn.Module, strategy: Strategy) -> None:
        self._random = random_states(strategy)
        self._buffers = KeptBuffers(model)

    def put_back(self) -> None:
        self._random.put_back()
        self._buffers.put_back()


class _Held:
    """Holds the micro-batches of a window, for more than one evaluation: loaded the first time, and kept on the host.

    A list or tuple of micro-batches is taken as it is, on whatever device they are.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        self._source = source
        self._kept: list[Callable[[], Any]] = []

    def micro_batches(self) -> Iterable[Any]:
        if isinstance(self._source, list | tuple):
            return self._source
        batches = (back() for back in self._kept) if self._kept else self._loaded()
        return self._source.over(batches) if isinstance(self._source, Window) else batches

    def _loaded(self) -> Iterator[Any]:
        for batch in self._source:
            self._kept.append(_on_host(batch))
            yield batch


def _on_host(batch: Any) -> Callable[[], Any]:
    """Copies a micro-batch's tensors to the host; returns what returns it on its devices again."""
    devices = [tensor.device for tensor in tensors_of(batch)]
    if all(device.type == "cpu" for device in devices):
        return lambda: batch

    def moved(leaves: Any, places: Iterator[torch.device]) -> Any:
        # Into pinned memory, in the order of the device's stream: the host waits for neither copy.
        return mapped(
            leaves, lambda leaf: leaf.to(next(places), non_blocking=True) if isinstance(leaf, Tensor) else leaf
        )

    kept = moved(batch, iter([torch.device("cpu")] * len(devices)))
    return lambda: moved(kept, iter(devices))

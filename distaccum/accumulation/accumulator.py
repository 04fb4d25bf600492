"""Gradients accumulated over micro-steps, synchronised once, scaled exactly, clipped and stepped.

    update = optimizer( Σ over all samples of the window of grad(loss_sum) / Σ of weight )

Both sums run over all micro-steps and all ranks. There is no division by the number of accumulation steps anywhere, so
ragged windows, ranks with unequal work and sequences of unequal length are exact by construction.

An update in the order of this file: `window` → `OpenWindow.each` → `_sync_context` (which micro-step synchronises) →
`backward` → `OpenWindow.begin_sync` (of the last one) → `step` → `_update` (scale, clip, step).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distaccum.accumulation.gradient_hook import OnGradients, show_gradients
from distaccum.accumulation.gradient_norms import by_group, gradient_norms
from distaccum.accumulation.micro_batches import require_equal_micro_steps
from distaccum.accumulation.micro_gradients import watcher_of
from distaccum.accumulation.noise_scale import Measurement, NoiseScale
from distaccum.accumulation.open_window import OpenWindow
from distaccum.accumulation.optimizer_step import Gradients, ScaledStep, unscaled
from distaccum.accumulation.recovery import Recovery, Share, Tell, explaining_memory_of_step, micro_step
from distaccum.accumulation.reevaluation import reevaluation_of
from distaccum.accumulation.result import LossTerm, TaskOutput, UpdateResult
from distaccum.accumulation.terms import Denominators, TermCounter, Weights, WindowTerms, checked_terms
from distaccum.accumulation.totals import SumsOverRanks, is_to_be_made, loss_scale, require_summable
from distaccum.accumulation.unfinished import put_in, taken_out
from distaccum.errors import require, require_one_clipping
from distaccum.runtime.devices import Stopwatch
from distaccum.strategies import Strategy, strategy_of

Batch = TypeVar("Batch")
_OUT_OF_STEP = "a gradient sync has failed, so ranks may be out of step. Start all ranks again, from a checkpoint."


class Accumulator:
    """Makes one optimizer update of a window of micro-batches, however it is cut.

    Usable alone in anybody's own loop:

        for window in loader:
            with accumulator.window(window) as micro_batches:
                for inputs, targets in micro_batches:
                    loss_sum = F.cross_entropy(model(inputs), targets, reduction="sum")
                    accumulator.backward(loss_sum, weight=len(targets))
            update = accumulator.step()

    Or, in one call, which can also go on when memory runs out (see `recovery`):

        for window in loader:
            update = accumulator.run(window, lambda batch: task(model, batch))

    Args:
        model: what is called in the micro-steps: a plain module in one process, `DistributedDataParallel` in several.
        optimizer: steps over the parameters; its `step` and `zero_grad` are called here and nowhere else. One that
            evaluates the loss itself (the `closure` of its `step` has no default) needs `run`.
        clip_norm: largest norm of the window's mean gradient; None for no such clipping.
        clip_value: largest absolute value of each number of it, in the place of `clip_norm`.
        scaler: a `torch.amp.GradScaler`, for float16. It steps, skips and adapts once per update.
        skip_nonfinite: skip an update whose loss or gradient is NaN or infinite, instead of raising.
        strategy: how the model is placed. Default: what the model shows.
        flags: questions by name (the same on each rank), asked at the end of each window; `UpdateResult.flags` has
            those that any rank said yes to, on every rank alike. So ranks agree to stop at the same update when one got
            a signal. The answers are sent with the loss and need no collective of their own.
        reports: the same for numbers, of which `UpdateResult.reports` has every rank's.
        time_micro_steps: measure each micro-step, which takes a few microseconds of it on a GPU.
        recovery: has `run` go on with smaller micro-batches when memory runs out. None: that ends with a `UserError`.
        noise_scale: measure how noisy gradients are, in each update for which it is due.
        on_gradients: called with the mean gradients of the window by their parameters' names, the same on every rank,
            before they are clipped; under FSDP they are this rank's shards (`DTensor`s). It may change them in place,
            alike on all ranks; the norm is then taken again. May be set anew between windows.
        weights: counts the elements of each loss in a micro-batch, by name (`main` and the terms that micro-steps
            give), where there are several: see `accumulation.terms`. Called as a window opens, with each micro-batch.

    Raises:
        UserError: the model is a bare module although there are several ranks, it makes sparse gradients, a limit is
            not above 0 or both are given, or another accumulator of some of the same parameters has a window open.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        skip_nonfinite: bool = False,
        strategy: Strategy | None = None,
        flags: Mapping[str, Callable[[], bool]] | None = None,
        reports: Mapping[str, Callable[[], float]] | None = None,
        time_micro_steps: bool = False,
        recovery: Recovery | None = None,
        noise_scale: NoiseScale | None = None,
        on_gradients: OnGradients | None = None,
        weights: Weights | None = None,
    ) -> None:
        require_one_clipping(clip_norm=clip_norm, clip_value=clip_value)
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.scaler = scaler
        self.skip_nonfinite = skip_nonfinite
        self.strategy = strategy_of(model, strategy)
        self.flags = dict(flags or {})
        self.reports = dict(reports or {})
        self.time_micro_steps = time_micro_steps
        self.recovery = recovery
        self.noise_scale = noise_scale
        self.on_gradients = on_gradients
        self.weights = weights
        self.updates = 0
        """Windows that have been brought to their end, skipped ones included."""
        self.unfinished: Mapping[str, Tensor] = {}
        """What `take_out` returned, to go on with in the next window, which leaves out its `done` micro-batches."""
        self._model = model
        self._gradients = Gradients(optimizer, model, self.strategy)
        self._open: OpenWindow | None = None
        self._last_weight: float | None = None
        self._is_out_of_step, self._norm_before = False, 0.0
        self._stopwatch = Stopwatch(self.strategy.device)
        self._terms = TermCounter(self.strategy, weights)
        self._sums = SumsOverRanks(self.strategy, self.flags, self.reports)
        self._scaled_step = ScaledStep(optimizer, clip_value)
        self._reevaluation = reevaluation_of(
            optimizer, model, self.strategy, clip_norm or clip_value, scaler, skip_nonfinite, recovery, noise_scale
        )
        self._gradients.begin()
        self.clear_gradients()

    @contextmanager
    def window(
        self,
        micro_batches: Iterable[Batch],
        *,
        started: float | None = None,
        data_seconds: float = 0.0,
        share: Share | None = None,
        denominators: Denominators | None = None,
    ) -> Iterator[Iterator[Batch]]:
        """Opens a window; gives an iterator over its micro-batches.

        Each micro-batch but the last is handed out inside the strategy's `no_sync`, which encloses the caller's
        forward and backward. After an exception the window's gradients are dropped, and the next window starts clean;
        but not if it came in the last backward among several ranks, which may be out of step then.

        Args:
            micro_batches: a `Window`, a list, or any iterable; each item must be followed by one `backward`.
            started, data_seconds: when work on the window began (`time.perf_counter()`) and how long it has waited for
                data, if that was before this call.
            share, denominators: `run`'s own, whose micro-steps may be taken again.
        """
        started = time.perf_counter() if started is None else started
        if self._reevaluation is not None:
            self._reevaluation.require_running()
        if denominators is None:
            micro_batches, denominators = self._opening(micro_batches)
        window = OpenWindow(
            number=self.updates + 1,
            strategy=self.strategy,
            gradients=self._gradients,
            scale=loss_scale(micro_batches, self._last_weight),
            source=micro_batches,
            share=share,
            scaler=self.scaler,
            started=started,
            data_seconds=data_seconds + (denominators.seconds if denominators is not None else 0.0),
            norm_before=self._norm_before,
            stopwatch=self._stopwatch,
            time_micro_steps=self.time_micro_steps,
            terms=WindowTerms(denominators, self.strategy) if denominators is not None else None,
            micro_gradients=watcher_of(micro_batches, self.updates, self.noise_scale, self._gradients),
        )
        self._gradients.begin()
        self._open = window
        micro_steps = window.each(self._sync_context)
        try:
            window.remember(self._model, may_be_skipped=self.skip_nonfinite)
            self.unfinished = put_in(window, self.unfinished)
            with window.micro_gradients or nullcontext():
                yield micro_steps
            if not window.micro_steps:
                self._sums.sync_without_micro_batch(window, self._model)
            window.require_sync()
        except BaseException:
            micro_steps.close()  # leaves no_sync, if a micro-step is inside it
            self._is_out_of_step = window.is_syncing and self.strategy.process_group is not None
            self.strategy.drop_gradients()
            self.clear_gradients()
            raise

    def _opening(
        self, micro_batches: Iterable[Any], tell: Tell = lambda *_: None
    ) -> tuple[Iterable[Any], Denominators | None]:
        """Returns the micro-batches of a window that may be opened, and what its losses are divided by, if counted."""
        if self._open is not None:
            raise RuntimeError("the window before was neither ended by step() nor dropped by clear_gradients()")
        require(not self._is_out_of_step, _OUT_OF_STEP)
        require_equal_micro_steps(micro_batches, self.strategy)
        return self._terms.count(micro_batches, tell)

    def _sync_context(self, window: OpenWindow) -> AbstractContextManager[None]:
        """Decides about the sync, here alone: every micro-step is inside `no_sync` but the window's last.

        So is the last one where micro-steps can be taken again: `OpenWindow.begin_sync` asks for the sync after its
        forward then.
        """
        return nullcontext() if window.is_last and not window.can_recover else self.strategy.no_sync()

    def backward(
        self,
        loss_sum: Tensor,
        weight: Tensor | float,
        sums: Mapping[str, Tensor] | None = None,
        num_samples: int | None = None,
        terms: Mapping[str, LossTerm] | None = None,
    ) -> None:
        """Back-propagates one micro-batch. On the window's last one, gradients are synchronised on the way.

        Never makes the host wait for the device.

        Args:
            loss_sum: sum of the per-element losses, a scalar with a gradient. Not a mean.
            weight: number of elements summed: a number, or a scalar tensor.
            sums: further sums to be added up over micro-steps and ranks, of any shape; the same names and shapes in
                each micro-step and on each rank.
            num_samples: samples of the micro-batch: the noise scale needs it where windows aren't a `WindowLoader`'s.
            terms: further losses by name, which `weights` has counted; those that the micro-batch has nothing of may
                be missing.
        """
        window = self._open
        if window is None or not window.awaiting_backward:
            raise RuntimeError("backward() is called once for each micro-batch that accumulator.window() hands out")
        require_summable(loss_sum, weight)
        loss_sum = window.add(loss_sum, weight, sums or {}, checked_terms(terms))
        if self.noise_scale is not None:
            window.count_samples(num_samples)
        if window.is_last:
            loss_sum = window.begin_sync(loss_sum, self._sums.own(window))
        scaled = loss_sum if self.scaler is None else self.scaler.scale(loss_sum)
        scaled.backward(gradient=window.seed_of(loss_sum))  # type: ignore[no-untyped-call]
        if window.micro_gradients is not None and window.is_last:
            window.micro_gradients.start(window.scale, self.scaler)
        window.end_backward()

    def step(self) -> UpdateResult:
        """Ends the window: scales the gradients to the mean over the window, clips, steps and clears them.

        The host waits for the device once, here, before the optimizer moves anything.

        Raises:
            UserError: the loss or the gradient is NaN or infinite, or the total weight is zero, and `skip_nonfinite`
                is off. The parameters have not moved.
        """
        result = self._finished()
        assert result is not None  # only `run` has micro-steps taken again
        return result

    def _finished(self) -> UpdateResult | None:
        """`step`; returns None, with all as before the window, if a rank ran out of memory in its last backward."""
        window = self._open
        if window is None or window.totals is None:
            raise RuntimeError("step() comes after a whole window: with accumulator.window(…) as micro_batches: …")
        self.updates += 1
        result = None
        try:
            gradients = self._gradients.of_window(window.calls_before)
            with unscaled(self.scaler, self.optimizer) as scaling:
                result = self._update(window, window.totals(), gradients)
                scaling.stays = result is None
        finally:
            self._open = None
            if self._reevaluation is None:  # else they are the optimizer's, until it has made its step
                self.clear_gradients()
        if result is None or self._reevaluation is not None:
            self.updates -= 1
        return result

    def _update(self, window: OpenWindow, totals: Tensor, gradients: list[Tensor]) -> UpdateResult | None:
        """Scales the gradients to the window's mean, clips them and steps; None as in `_finished`."""
        norms = gradient_norms(self.optimizer, self.strategy)
        seen = (window.micro_gradients.seen(),) if window.micro_gradients is not None else ()
        # The one wait for the device in an update: everything that the host wants to know, in one copy.
        numbers = torch.cat([norms.to(totals), *seen, totals]).cpu()
        *of_groups, norm = numbers[: len(norms)].tolist()
        if window.can_recover and not math.isfinite(norm) and window.is_lost_on_any_rank():
            window.put_back()
            return None
        read = self._sums.read(numbers[-len(totals) :], window, norms.dtype)
        weight = window.divisor(read["weight"])
        self._last_weight, self._norm_before = weight, norm if math.isfinite(norm) else 0.0
        # The sync has added up the ranks' sums, each multiplied by the scale.
        factor = self.strategy.sync_divisor / (weight * window.scale) if weight else math.nan
        grad_norm, group_norms = norm * factor, by_group(self.optimizer, (value * factor for value in of_groups))
        skipped = not is_to_be_made(window, read["loss"], weight, grad_norm, self.skip_nonfinite, self.scaler)
        more: dict[str, Any] = read | {"group_norms": group_norms}
        if skipped:
            # A NaN that the forwards have left in BatchNorm's statistics would stay for good.
            window.buffers.put_back()
            self.strategy.drop_gradients()
        else:
            if self.on_gradients is not None:
                parameters = self._gradients.of_optimizer()
                grad_norm = show_gradients(self.on_gradients, self.strategy, parameters, factor, grad_norm)
                self._norm_before, factor = grad_norm, 1.0
            if self.clip_norm is not None:  # by the formula of torch.nn.utils.clip_grad_norm_
                factor *= min(1.0, self.clip_norm / (grad_norm + 1e-6))
            self._scaled_step(gradients, factor, self.scaler)
        if self.noise_scale is not None and seen and not skipped:
            whole = norm * self.strategy.sync_divisor / window.scale
            more |= self.noise_scale.update(Measurement(whole * whole, *numbers[len(norms) : len(norms) + 4].tolist()))
        return UpdateResult(grad_norm=grad_norm, skipped=skipped, **window.measured(), **more)

    def take_out(self) -> dict[str, Tensor]:
        """Returns a copy of what the open window has accumulated on this rank, to go on with in another process.

        To be called between two micro-steps: see `accumulation.unfinished`. Empty if it can't be gone on with.
        """
        return taken_out(self._open) if self._open is not None and self._reevaluation is None else {}

    def clear_gradients(self) -> None:
        """Forgets all gradients, and drops a window whose `step()` has not come. `step()` does so by itself."""
        self._open = None
        self._gradients.end()

    def run(
        self, micro_batches: Iterable[Any], forward: Callable[[Any], TaskOutput], tell: Tell | None = None
    ) -> UpdateResult:
        """Makes the update of one window: `window`, `backward` and `step` in one call.

        Args:
            micro_batches: as for `window`; for `recovery`, a window of a `WindowLoader`.
            forward: called with each micro-batch; gives `loss_sum`, `weight` and `sums`, as for `backward`. It may be
                called again with a part of the same samples.
            tell: called with what begins, as `distaccum.accumulation.recovery.Tell` says.

        Raises:
            UserError: as `step`; or memory has run out, and there is no going on.
        """
        tell, started = tell or (lambda *_: None), time.perf_counter()
        if self._reevaluation is not None:
            attempt = partial(self._attempt, forward=forward, tell=tell, share=None)
            made = self._reevaluation.run(micro_batches, attempt, self.clear_gradients, tell)
            self.updates += 1
            return made
        micro_batches, counted = self._opening(micro_batches, tell)
        share = Share(micro_batches, self.recovery) if self.recovery and self.strategy.can_recover else None
        opening = {"share": share, "denominators": counted, "started": started}
        while (result := self._attempt(micro_batches, forward, tell, **opening)) is None:
            assert share is not None
            share.begin_again_on_all_ranks(self.updates + 1)
        if share is not None:
            share.end()
        return result

    def _attempt(
        self, micro_batches: Iterable[Any], forward: Callable[[Any], TaskOutput], tell: Tell, **opening: Any
    ) -> UpdateResult | None:
        """Returns None if a rank was out of memory in its last backward; then nothing has changed."""
        tell("loading", 1, False)
        share = opening["share"]
        with self.window(micro_batches, **opening) as batches:
            window = self._open
            assert window is not None
            for batch in batches:
                trouble = micro_step(window, batch, forward, self.backward, tell, self.recovery)
                if trouble is not None and share is not None:
                    del batch
                    share.take_again(window, *trouble)
                tell("loading", window.micro_steps + 1, False)
        tell("step", window.micro_steps, True)
        with explaining_memory_of_step():
            return self._finished()

    def state_dict(self) -> dict[str, Any]:
        """Returns what updates depend on besides parameters, optimizer, scaler and windows. Called between windows."""
        state: dict[str, Any] = {"updates": self.updates, "last_weight": self._last_weight}
        state |= {"trained": self._gradients.trained(), "sums": self._sums.agreed}
        return state | ({"noise_scale": self.noise_scale.state_dict()} if self.noise_scale is not None else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.updates = int(state["updates"] or 0)
        self._last_weight = state["last_weight"]
        self._gradients.set_trained(state.get("trained", ()))
        self._sums.agreed = [(name, tuple(shape)) for name, shape in state.get("sums", ())]
        if self.noise_scale is not None and "noise_scale" in state:
            self.noise_scale.load_state_dict(state["noise_scale"])

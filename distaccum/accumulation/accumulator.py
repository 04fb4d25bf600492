"""The heart: gradients accumulated over micro-steps, synchronised once, scaled exactly, clipped and stepped.

    update = optimizer( Σ over all samples of the window of grad(loss_sum) / Σ of weight )

Both sums run over all micro-steps and all ranks. There is no division by the number of accumulation steps anywhere, so
ragged windows, ranks with unequal work and sequences of unequal length are exact by construction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distaccum.accumulation.micro_gradients import MicroGradients, measurement, watcher_of
from distaccum.accumulation.noise_scale import NoiseScale
from distaccum.accumulation.open_window import OpenWindow, with_last
from distaccum.accumulation.optimizer_step import SPARSE, Gradients, ScaledStep
from distaccum.accumulation.recovery import MicroStepOutput, Recovery, Tell, WindowRun, is_lost_on_any_rank
from distaccum.accumulation.result import UpdateResult
from distaccum.accumulation.totals import (
    SumsOverRanks,
    explain_nonfinite,
    loss_scale,
    require_same_norm,
    require_weight,
)
from distaccum.errors import UserError, require, require_positive
from distaccum.loaders import Window
from distaccum.runtime.buffers import KeptBuffers
from distaccum.runtime.devices import Stopwatch
from distaccum.strategies import Strategy, can_recover, strategy_of

Batch = TypeVar("Batch")


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
        optimizer: steps over the parameters; its `step` and `zero_grad` are called here and nowhere else.
        clip_norm: largest norm of the window's mean gradient; None for no clipping.
        scaler: a `torch.amp.GradScaler`, for float16. It steps, skips and adapts once per update.
        skip_nonfinite: skip an update whose loss or gradient is NaN or infinite, instead of raising.
        strategy: how the model is placed. Default: what the model shows.
        flags: questions by name, answered by each rank at the end of each window; `UpdateResult.flags` has those that
            any rank said yes to, on every rank alike. The answers ride along with the loss, at no collective's cost:
            it is how ranks agree, at the same update, to stop because one of them got a signal. The same names on each
            rank.
        reports: the same for numbers, of which `UpdateResult.reports` has every rank's.
        time_micro_steps: measure each micro-step, for a few microseconds of it on a GPU.
        recovery: has `run` go on with smaller micro-batches when memory runs out. None: that ends with a `UserError`.
        noise_scale: measure how noisy gradients are, in each update for which it is due.

    Raises:
        UserError: the model is a bare module although there are several ranks, it makes sparse gradients, `clip_norm`
            is not above 0, or another accumulator of some of the same parameters has a window open.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        skip_nonfinite: bool = False,
        strategy: Strategy | None = None,
        flags: Mapping[str, Callable[[], bool]] | None = None,
        reports: Mapping[str, Callable[[], float]] | None = None,
        time_micro_steps: bool = False,
        recovery: Recovery | None = None,
        noise_scale: NoiseScale | None = None,
    ) -> None:
        require_positive(clip_norm=clip_norm)
        embeddings = [part for part in model.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
        require(not any(part.sparse for part in embeddings), SPARSE)
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
        self.updates = 0
        """Windows that have been brought to their end, skipped ones included."""
        self._model = model
        self._gradients = Gradients(optimizer, model, self.strategy)
        self.recoverable = self.strategy if recovery is not None and can_recover(self.strategy) else None
        """The strategy, if micro-steps may be taken again with it."""
        self._open: OpenWindow | None = None
        self._is_out_of_step = False
        self._last_weight: float | None = None
        self._norm_before = 0.0
        self._stopwatch = Stopwatch(self.strategy.device)
        self._sums = SumsOverRanks(self.strategy, self.flags, self.reports)
        self._scaled_step = ScaledStep(optimizer, tries_again=recovery is not None)
        self._gradients.begin()
        self.clear_gradients()

    def state_dict(self) -> dict[str, Any]:
        """What the next update depends on besides parameters, optimizer, scaler and window; between two windows."""
        state = {"updates": self.updates, "last_weight": self._last_weight, "trained": self._gradients.trained()}
        return state | ({"noise_scale": self.noise_scale.state_dict()} if self.noise_scale is not None else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`'s answer."""
        self.updates = int(state["updates"] or 0)
        self._last_weight = state["last_weight"]
        self._gradients.set_trained(state.get("trained", ()))
        if self.noise_scale is not None and "noise_scale" in state:
            self.noise_scale.load_state_dict(state["noise_scale"])

    def run(
        self, micro_batches: Iterable[Any], forward: Callable[[Any], MicroStepOutput], tell: Tell | None = None
    ) -> UpdateResult:
        """Makes the update of one window: `window`, `backward` and `step` in one call.

        Args:
            micro_batches: as for `window`; for `recovery`, a window of a `WindowLoader`.
            forward: called with each micro-batch; gives `loss_sum`, `weight` and `sums`, as for `backward`. It may be
                called again with a part of the same samples.
            tell: told what begins, as `distaccum.accumulation.recovery.Tell` says.

        Raises:
            UserError: as `step`; or memory has run out, and there is no going on.
        """
        return WindowRun(self, micro_batches, forward, tell).result()

    @contextmanager
    def window(
        self, micro_batches: Iterable[Batch], *, started: float | None = None, data_seconds: float = 0.0
    ) -> Iterator[Iterator[Batch]]:
        """Opens a window; gives an iterator over its micro-batches.

        Each micro-batch but the last is handed out inside the strategy's `no_sync`, which encloses the caller's
        forward and backward. If an exception leaves the window, `no_sync` is left too and the window's gradients are
        dropped, so that the next window starts clean; but not if it came in the last backward among several ranks,
        which may be out of step then.

        Args:
            micro_batches: a `Window`, a list, or any iterable; each item must be followed by one `backward`.
            started, data_seconds: when work on the window began (`time.perf_counter()`) and how long it has waited for
                data, if that was before this call.
        """
        items = with_last(micro_batches)
        with self.opened(micro_batches, items, started=started, data_seconds=data_seconds) as (_, micro_steps):
            yield micro_steps

    @contextmanager
    def opened(
        self,
        micro_batches: Iterable[Any],
        items: Iterator[tuple[Batch, bool]],
        sizes: Sequence[int] | None = None,
        *,
        started: float | None = None,
        data_seconds: float = 0.0,
    ) -> Iterator[tuple[OpenWindow, Iterator[Batch]]]:
        """`window`, for those who take part in its work.

        Args:
            items: the micro-batches, and whether each is the last.
            sizes: of the micro-batches handed out so far, if they may be taken again (see
                `distaccum.accumulation.recovery`).
        """
        if self._open is not None:
            raise RuntimeError("the last window was not brought to its end by step() or dropped by clear_gradients()")
        if self._is_out_of_step:
            raise UserError(
                "a gradient sync has failed, so ranks may be out of step. Start all ranks again, from a checkpoint."
            )
        self.require_equal_micro_steps(micro_batches)
        whole = micro_batches if isinstance(micro_batches, Window) else None
        window = OpenWindow(
            scale=loss_scale(micro_batches, self._last_weight),
            sizes=whole.sizes if sizes is None and whole is not None else sizes,
            started=time.perf_counter() if started is None else started,
            data_seconds=data_seconds,
            calls_before=self.strategy.traffic.calls,
            bytes_before=self.strategy.traffic.bytes,
            norm_before=self._norm_before,
            recovers=sizes is not None,
            micro_gradients=self._watcher(micro_batches),
        )
        self._gradients.begin()
        self._open = window
        micro_steps = self._micro_steps(window, items)
        try:
            self._remember(window)
            with window.micro_gradients or nullcontext():
                yield window, micro_steps
            if not window.micro_steps:
                self._sums.take_no_part(window, self._model)
            if window.totals is None:
                raise RuntimeError(
                    f"the window was left after {window.micro_steps} micro-step(s), before the backward of the "
                    "last one, so its gradients were never synchronised: iterate over all of its micro-batches"
                )
        except BaseException:
            micro_steps.close()  # leaves no_sync, if a micro-step is inside it
            self._is_out_of_step = window.is_syncing and self.strategy.process_group is not None
            self.strategy.drop_gradients()
            self.clear_gradients()
            raise

    def _watcher(self, micro_batches: Iterable[Any]) -> MicroGradients | None:
        if self.noise_scale is None:
            return None
        return watcher_of(micro_batches, self.updates, self.noise_scale, self.strategy, self._gradients.of_optimizer())

    def require_equal_micro_steps(self, micro_batches: Iterable[Any]) -> None:
        """Refuses a window whose ranks may take unequally many micro-steps, where they would wait for ever.

        Raises:
            UserError: it is one, and the strategy's micro-steps hold collectives.
        """
        if (
            isinstance(micro_batches, Window)
            and self.strategy.equal_micro_steps
            and not micro_batches.equal_micro_steps
        ):
            raise UserError(
                "all ranks must take equally many micro-steps here (FSDP, a static graph and SyncBatchNorm have "
                "collectives in each of them), and this window doesn't promise that. Give WindowLoader "
                "equal_micro_steps=True."
            )

    def _remember(self, window: OpenWindow) -> None:
        """Keeps what the window changes besides gradients, if it may have to be undone."""
        if window.recovers and self.recoverable is not None:
            self.recoverable.begin_window()
            window.remembered = {name: value.clone() for name, value in self.strategy.state_tensors().items()}
        if window.recovers or self.skip_nonfinite:
            window.buffers = KeptBuffers(self._model)

    def _micro_steps(self, window: OpenWindow, items: Iterator[tuple[Batch, bool]]) -> Generator[Batch, None, None]:
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            window.data_seconds += time.perf_counter() - asked
            if item is None:
                return
            micro_batch, window.is_last = item
            # The one place that asks "is this the sync step?".
            with nullcontext() if window.is_last and not window.recovers else self.strategy.no_sync():
                window.micro_steps += 1
                window.awaiting_backward = True
                if self.time_micro_steps:
                    window.micro_step_start = self._stopwatch.mark()
                if window.is_last and window.recovers and self.recoverable is not None:
                    window.last_gradient = self.recoverable.last_gradient(self._gradients.of_optimizer())
                yield micro_batch
                if window.awaiting_backward:
                    raise RuntimeError(
                        f"micro-step {window.micro_steps} ended without accumulator.backward(loss_sum, weight)"
                    )

    def backward(
        self,
        loss_sum: Tensor,
        weight: Tensor | float,
        sums: Mapping[str, Tensor] | None = None,
        num_samples: int | None = None,
    ) -> None:
        """Back-propagates one micro-batch. On the window's last one, gradients are synchronised on the way.

        Never makes the host wait for the device.

        Args:
            loss_sum: sum of the per-element losses, a scalar with a gradient. Not a mean.
            weight: number of elements summed: a number, or a scalar tensor.
            sums: further sums to be added up over micro-steps and ranks, of any shape; the same names and shapes in
                each micro-step and on each rank.
            num_samples: samples of the micro-batch: the noise scale needs it where windows aren't a `WindowLoader`'s.
        """
        window = self._open
        if window is None or not window.awaiting_backward:
            raise RuntimeError("backward() is called once for each micro-batch that accumulator.window() hands out")
        if loss_sum.ndim != 0 or not loss_sum.requires_grad:
            raise UserError(
                f"loss_sum must be a scalar tensor with a gradient; got shape {tuple(loss_sum.shape)}, "
                f'requires_grad={loss_sum.requires_grad}. Use reduction="sum" on the output of the model.'
            )
        require_weight(weight)
        window.awaiting_backward = False
        is_placeholder = window.sizes is not None and window.sizes[window.micro_steps - 1] == 0
        if is_placeholder:
            loss_sum = self.strategy.placeholder_loss(loss_sum)
            weight = 0.0
            sums = {name: torch.zeros_like(value) for name, value in (sums or {}).items()}
        window.loss_sums.append(loss_sum.detach())
        window.weights.append(weight.detach() if isinstance(weight, Tensor) else weight)
        for name, value in (sums or {}).items():
            window.sums.setdefault(name, []).append(value.detach())
        if window.is_last:
            totals = self._sums.own(window)
            if window.recovers and self.recoverable is not None:
                if window.last_gradient is not None:
                    loss_sum = loss_sum + window.last_gradient.to(loss_sum)
                self.recoverable.begin_sync(loss_sum)
            window.is_syncing = True
            window.totals = self.strategy.summed(totals)
        if self.noise_scale is not None:
            num_samples = num_samples if window.sizes is None else window.sizes[window.micro_steps - 1]
            if num_samples is None:
                raise UserError(
                    "the noise scale counts samples, and these windows don't say how many a micro-batch has: call "
                    "accumulator.backward(loss_sum, weight, num_samples=…)"
                )
            if window.micro_gradients is not None:
                window.micro_gradients.begin(num_samples)
        # A power of two, so that it changes no bit of the result; see loss_scale.
        if window.seed is None or window.seed.dtype != loss_sum.dtype:
            window.seed = torch.full_like(loss_sum, window.scale)
        if self.scaler is None:
            loss_sum.backward(gradient=window.seed)  # type: ignore[no-untyped-call]
        else:
            self.scaler.scale(loss_sum).backward(gradient=window.seed)  # type: ignore[no-untyped-call]
        if window.micro_gradients is not None and window.is_last:
            window.micro_gradients.start(1 / self._loss_scale(window))
        window.is_syncing = False
        if window.is_last or self.time_micro_steps:
            window.backward_end = self._stopwatch.mark()
        if self.time_micro_steps:
            window.marks.append((window.micro_step_start, window.backward_end))

    def step(self) -> UpdateResult:
        """Ends the window: scales the gradients to the mean over the window, clips, steps and clears them.

        The host waits for the device once, here, before the optimizer moves anything.

        Raises:
            UserError: the loss or the gradient is NaN or infinite, or the total weight is zero, and `skip_nonfinite`
                is off. The parameters have not moved.
        """
        result = self.finished()
        assert result is not None
        return result

    def finished(self) -> UpdateResult | None:
        """`step`; or None if a rank has run out of memory in its last backward: all is as it was before the window."""
        window = self._open
        if window is None or window.totals is None:
            raise RuntimeError("step() comes after a whole window: with accumulator.window(…) as micro_batches: …")
        self.updates += 1
        try:
            result = self._finish(window, window.totals)
        finally:
            self.clear_gradients()
        if result is None:
            self.updates -= 1
        return result

    def begin_again(self, window: OpenWindow) -> None:
        """Drops what this rank has accumulated in the open window; the others don't know of it."""
        self._gradients.clear()
        window.buffers.put_back()
        window.forget_micro_steps()

    def _finish(self, window: OpenWindow, totals: Callable[[], Tensor]) -> UpdateResult | None:
        gradients = self._gradients.of_window(window.calls_before)
        if self.scaler is None:
            return self._update(window, totals(), gradients)
        self.scaler.unscale_(self.optimizer)
        result, scale = None, None
        try:
            result = self._update(window, totals(), gradients)
            scale = self.scaler.get_scale() if result is None else None  # it has not seen this window
        finally:
            self.scaler.update(scale)
        return result

    def _update(self, window: OpenWindow, totals: Tensor, gradients: list[Tensor]) -> UpdateResult | None:
        raw_norm = self.strategy.total_norm(gradients)
        seen = (window.micro_gradients.seen(),) if window.micro_gradients is not None else ()
        # The one wait for the device in an update: everything that the host wants to know, in one copy.
        numbers = torch.cat([*seen, totals, raw_norm.to(totals)[None]]).tolist()
        norm = numbers.pop()
        if window.recovers and not math.isfinite(norm) and is_lost_on_any_rank(window, self.strategy):
            window.buffers.put_back()
            self._gradients.take_back()
            self.strategy.load_state_tensors(window.remembered)
            return None
        measured, numbers = (numbers[:4], numbers[4:]) if seen else ([], numbers)
        read = self._sums.read(numbers, window)
        loss, weight, norm_before = read["loss"], read["weight"], read.pop("norm_before")
        require_same_norm(self.updates - 1, window, norm_before, raw_norm.dtype)
        self._last_weight, self._norm_before = weight, norm if math.isfinite(norm) else 0.0
        # The sync has added up the ranks' sums, each multiplied by the scale.
        factor = self.strategy.sync_divisor / (weight * window.scale) if weight else math.nan
        grad_norm = norm * factor
        # All ranks see the same numbers, so all come to the same answer.
        has_loss = math.isfinite(loss) and 0 < weight < math.inf
        skipped = not (has_loss and math.isfinite(grad_norm))
        # An overflow of scaled gradients is the scaler's affair, which lowers its scale.
        if skipped and not (
            self.skip_nonfinite or (has_loss and self.scaler is not None and self.scaler.get_scale() >= 1)
        ):
            raise UserError(explain_nonfinite(self.updates, window, self.strategy, loss, weight, grad_norm))
        if not skipped:
            if self.clip_norm is not None:
                # The same formula as torch.nn.utils.clip_grad_norm_.
                factor *= min(1.0, self.clip_norm / (grad_norm + 1e-6))
            self._scaled_step(gradients, factor, self.scaler)
        else:
            # A NaN that the forwards have left in BatchNorm's statistics would stay for good.
            window.buffers.put_back()
            self.strategy.drop_gradients()
        sum_norm = norm * self.strategy.sync_divisor / window.scale
        noise: dict[str, Any] = {}
        if self.noise_scale is not None and measured and not skipped:
            noise = self.noise_scale.told(measurement(measured, sum_norm))
        traffic = self.strategy.traffic
        synced = traffic.calls > window.calls_before
        return UpdateResult(
            grad_norm=grad_norm,
            skipped=skipped,
            micro_steps=window.micro_steps,
            sync_calls=traffic.calls - window.calls_before,
            sync_bytes=traffic.bytes - window.bytes_before,
            seconds=time.perf_counter() - window.started,
            data_seconds=window.data_seconds,
            micro_seconds=window.micro_seconds(self._stopwatch, traffic.last_launch if synced else None),
            sync_seconds=self._stopwatch.seconds(traffic.last_launch, window.backward_end) if synced else 0.0,
            **read,
            **noise,
        )

    def _loss_scale(self, window: OpenWindow) -> Tensor:
        """What the losses of the window have been multiplied by, in float64 on the device."""
        scale = torch.full((), window.scale, dtype=torch.float64, device=self.strategy.device)
        return scale if self.scaler is None else self.scaler.scale(scale)

    def clear_gradients(self) -> None:
        """Forgets all gradients, and drops a window whose `step()` has not come. `step()` does so by itself."""
        self._open = None
        self._gradients.end()

"""The heart: gradients accumulated over micro-steps, synchronised once, scaled exactly, clipped and stepped.

    update = optimizer( Σ over all samples of the window of grad(loss_sum) / Σ of weight )

Both sums run over all micro-steps and all ranks. There is no division by the number of accumulation steps anywhere, so
ragged windows, ranks with unequal work and sequences of unequal length are exact by construction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.devices import Stopwatch
from distaccum.errors import UserError
from distaccum.loaders import Window
from distaccum.stepping import ScaledStep
from distaccum.strategies import Strategy, local_parts, strategy_of
from distaccum.updates import OpenWindow, UpdateResult, added_up, unflatten, with_last

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

    Raises:
        UserError: the model is a bare module although there are several ranks.
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
    ) -> None:
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.scaler = scaler
        self.skip_nonfinite = skip_nonfinite
        self.strategy = strategy or strategy_of(model)
        self.flags = dict(flags or {})
        self.reports = dict(reports or {})
        self.time_micro_steps = time_micro_steps
        self.updates = 0
        """Windows that have been brought to their end, skipped ones included."""
        self._model = model
        self._parameters = list(model.parameters())  # walking over the modules takes as long as clearing
        self._open: OpenWindow | None = None
        self._last_weight: float | None = None
        self._stopwatch = Stopwatch(self.strategy.device)
        self._scaled_step = ScaledStep(optimizer)
        self.clear_gradients()

    def state_dict(self) -> dict[str, float | int | None]:
        """What the next update depends on besides parameters, optimizer, scaler and window; between two windows."""
        return {"updates": self.updates, "last_weight": self._last_weight}

    def load_state_dict(self, state: Mapping[str, float | int | None]) -> None:
        """Goes on from `state_dict()`'s answer."""
        self.updates = int(state["updates"] or 0)
        self._last_weight = state["last_weight"]

    @contextmanager
    def window(
        self, micro_batches: Iterable[Batch], *, started: float | None = None, data_seconds: float = 0.0
    ) -> Iterator[Iterator[Batch]]:
        """Opens a window; gives an iterator over its micro-batches.

        Each micro-batch but the last is handed out inside the strategy's `no_sync`, which encloses the caller's
        forward and backward. If an exception leaves the window, `no_sync` is left too and the window's gradients are
        dropped, so that the next window starts clean.

        Args:
            micro_batches: a `Window`, a list, or any iterable; each item must be followed by one `backward`.
            started, data_seconds: when work on the window began (`time.perf_counter()`) and how long it has waited for
                data, if that was before this call.
        """
        if self._open is not None:
            raise RuntimeError("the window before this one has not been brought to its end by accumulator.step()")
        self.require_equal_micro_steps(micro_batches)
        self._open = OpenWindow(
            scale=self._choose_scale(micro_batches),
            sizes=micro_batches.sizes if isinstance(micro_batches, Window) else None,
            started=time.perf_counter() if started is None else started,
            data_seconds=data_seconds,
            calls_before=self.strategy.traffic.calls,
            bytes_before=self.strategy.traffic.bytes,
        )
        if self.skip_nonfinite:
            self._open.buffers = [(b, b.clone()) for b in self._model.buffers() if b.is_floating_point()]
        micro_steps = self._micro_steps(self._open, micro_batches)
        try:
            yield micro_steps
            if self._open.totals is None:
                raise RuntimeError(
                    f"the window was left after {self._open.micro_steps} micro-step(s), before the backward of the "
                    "last one, so its gradients were never synchronised: iterate over all of its micro-batches"
                )
        except BaseException:
            micro_steps.close()  # leaves no_sync, if a micro-step is inside it
            self._open = None
            self.strategy.drop_gradients()
            self.clear_gradients()
            raise

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

    def _micro_steps(self, window: OpenWindow, micro_batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        items = with_last(micro_batches)
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            window.data_seconds += time.perf_counter() - asked
            if item is None:
                return
            micro_batch, window.is_last = item
            # The one place that asks "is this the sync step?".
            with nullcontext() if window.is_last else self.strategy.no_sync():
                window.micro_steps += 1
                window.awaiting_backward = True
                if self.time_micro_steps:
                    window.micro_step_start = self._stopwatch.mark()
                yield micro_batch
                if window.awaiting_backward:
                    raise RuntimeError(
                        f"micro-step {window.micro_steps} ended without accumulator.backward(loss_sum, weight)"
                    )

    def backward(self, loss_sum: Tensor, weight: Tensor | float, sums: Mapping[str, Tensor] | None = None) -> None:
        """Back-propagates one micro-batch. On the window's last one, gradients are synchronised on the way.

        Never makes the host wait for the device.

        Args:
            loss_sum: sum of the per-element losses, a scalar with a gradient. Not a mean.
            weight: number of elements summed: a number, or a scalar tensor.
            sums: further sums to be added up over micro-steps and ranks, of any shape; the same names and shapes in
                each micro-step and on each rank.
        """
        window = self._open
        if window is None or not window.awaiting_backward:
            raise RuntimeError("backward() is called once for each micro-batch that accumulator.window() hands out")
        if loss_sum.ndim != 0 or not loss_sum.requires_grad:
            raise UserError(
                f"loss_sum must be a scalar tensor with a gradient; got shape {tuple(loss_sum.shape)}, "
                f'requires_grad={loss_sum.requires_grad}. Use reduction="sum" on the output of the model.'
            )
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
            self._start_totals(window)
        # A power of two, so that it changes no bit of the result; see _choose_scale.
        if window.seed is None or window.seed.dtype != loss_sum.dtype:
            window.seed = torch.full_like(loss_sum, window.scale)
        if self.scaler is None:
            loss_sum.backward(gradient=window.seed)  # type: ignore[no-untyped-call]
        else:
            self.scaler.scale(loss_sum).backward(gradient=window.seed)  # type: ignore[no-untyped-call]
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
        window = self._open
        if window is None or window.totals is None:
            raise RuntimeError("step() comes after a whole window: with accumulator.window(…) as micro_batches: …")
        self._open = None
        self.updates += 1
        try:
            return self._finish(window, window.totals())
        finally:
            self.clear_gradients()

    def _finish(self, window: OpenWindow, totals: Tensor) -> UpdateResult:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            raise UserError("no parameter of the optimizer got a gradient: does the loss depend on them?")
        if self.scaler is None:
            return self._update(window, totals, gradients)
        self.scaler.unscale_(self.optimizer)
        try:
            return self._update(window, totals, gradients)
        finally:
            self.scaler.update()

    def _update(self, window: OpenWindow, totals: Tensor, gradients: list[Tensor]) -> UpdateResult:
        raw_norm = self.strategy.total_norm(gradients)
        # The one wait for the device in an update: everything that the host wants to know, in one copy.
        loss_sum, weight, *rest, norm = torch.cat([totals, raw_norm.to(totals)[None]]).tolist()
        raised, rest = rest[: len(self.flags)], rest[len(self.flags) :]
        ranks = self.strategy.world_size
        reports = {name: tuple(rest[i * ranks : (i + 1) * ranks]) for i, name in enumerate(self.reports)}
        flat_sums = rest[len(self.reports) * ranks :]
        self._last_weight = weight
        loss = loss_sum / weight if weight else math.nan
        # The sync has added up the ranks' sums, each multiplied by the scale.
        factor = self.strategy.sync_divisor / (weight * window.scale) if weight else math.nan
        grad_norm = norm * factor
        skipped = not self._is_sound(window, loss, weight, grad_norm)
        if not skipped:
            if self.clip_norm is not None:
                # The same formula as torch.nn.utils.clip_grad_norm_.
                factor *= min(1.0, self.clip_norm / (grad_norm + 1e-6))
            self._scaled_step(gradients, factor, self.scaler)
        else:
            self._undo_forwards(window)
        traffic = self.strategy.traffic
        synced = traffic.calls > window.calls_before
        return UpdateResult(
            loss=loss,
            weight=weight,
            sums=unflatten(flat_sums, window.sums),
            flags=frozenset(name for name, number in zip(self.flags, raised, strict=True) if number),
            reports=reports,
            grad_norm=grad_norm,
            skipped=skipped,
            micro_steps=window.micro_steps,
            sync_calls=traffic.calls - window.calls_before,
            sync_bytes=traffic.bytes - window.bytes_before,
            seconds=time.perf_counter() - window.started,
            data_seconds=window.data_seconds,
            micro_seconds=self._micro_seconds(window, synced),
            sync_seconds=self._stopwatch.seconds(traffic.last_launch, window.backward_end) if synced else 0.0,
        )

    def _micro_seconds(self, window: OpenWindow, synced: bool) -> tuple[float, ...]:
        if not window.marks:
            return ()
        *marks, (start, end) = window.marks
        if synced:
            end = self.strategy.traffic.last_launch
        return tuple(self._stopwatch.seconds(begin, stop) for begin, stop in [*marks, (start, end)])

    def _undo_forwards(self, window: OpenWindow) -> None:
        """Takes back what the forwards of a skipped update may have left for good: a NaN in BatchNorm's statistics."""
        for buffer, before in window.buffers:
            buffer.copy_(before)
        self.strategy.drop_gradients()

    def _is_sound(self, window: OpenWindow, loss: float, weight: float, grad_norm: float) -> bool:
        """Whether the optimizer may step. All ranks see the same numbers, so all come to the same answer."""
        if math.isfinite(loss) and math.isfinite(grad_norm) and weight > 0:
            return True
        if self.skip_nonfinite:
            return False
        if self.scaler is not None and math.isfinite(loss) and weight > 0 and self.scaler.get_scale() >= 1:
            return False  # an overflow of the scaled gradients: the scaler lowers its scale
        if weight <= 0:
            what = f"the total weight of the window is {weight:g}, so there is nothing to take the mean of"
        elif not math.isfinite(loss):
            what = f"the loss is {loss}{self._where_nonfinite(window)}"
        else:
            what = f"the loss is {loss:.6g}, but the norm of the gradient is {grad_norm}"
        raise UserError(
            f"update {self.updates}: {what}. The parameters have not moved. Look at that data, lower the learning "
            "rate, or leave such updates out with train.on_nonfinite=skip."
        )

    def _where_nonfinite(self, window: OpenWindow) -> str:
        """Names the ranks and micro-steps whose loss went wrong. Every rank gets here, so it may use a collective."""
        flags = ~torch.stack(window.loss_sums).isfinite()
        mine = [step for step, flag in enumerate(flags.tolist(), 1) if flag]
        everyone = [mine]
        if self.strategy.process_group is not None:
            everyone = [[] for _ in range(self.strategy.world_size)]
            dist.all_gather_object(everyone, mine, group=self.strategy.process_group)
        found = [
            f"rank {rank}, micro-step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"
            for rank, steps in enumerate(everyone)
            if steps
        ]
        return f" ({'; '.join(found)})" if found else ""

    def _start_totals(self, window: OpenWindow) -> None:
        """Adds up loss, weight and sums, and sends them on their way with the backward that follows."""
        device = self.strategy.device
        weights = [value for value in window.weights if isinstance(value, Tensor)]
        if len(weights) < len(window.weights):
            numbers = math.fsum(value for value in window.weights if not isinstance(value, Tensor))
            weights.append(torch.full((), numbers, dtype=torch.float64, device=device))
        loss_sum, weight, *sums = (
            added_up(values, device).reshape(-1) for values in (window.loss_sums, weights, *window.sums.values())
        )
        totals = torch.cat([loss_sum, weight, *self._own_flags(device), *self._own_reports(device), *sums])
        window.totals = self.strategy.summed(totals)

    def _own_flags(self, device: torch.device) -> list[Tensor]:
        if not self.flags:
            return []
        flags = torch.zeros(len(self.flags), dtype=torch.float64, device=device)
        for number, ask in enumerate(self.flags.values()):
            if ask():
                flags[number].fill_(1.0)  # copying the answers to a GPU would make the host wait
        return [flags]

    def _own_reports(self, device: torch.device) -> list[Tensor]:
        """Each report as a vector with a place for every rank, of which this one fills its own."""
        group, ranks = self.strategy.process_group, self.strategy.world_size
        rank = dist.get_rank(group) if group is not None else 0
        vectors = []
        for ask in self.reports.values():
            vectors.append(torch.zeros(ranks, dtype=torch.float64, device=device))
            vectors[-1][rank].fill_(ask())
        return vectors

    def _choose_scale(self, micro_batches: Iterable[Any]) -> float:
        """A power of two near 1 / (total weight), by which every loss of the window is multiplied.

        It keeps gradients of sums in the range of gradients of means, for float16 and for compressed buckets. Being a
        power of two, it changes no bit otherwise. It must be the same on all ranks, so it comes from numbers that all
        know: the last window's total weight, or the size of the first window.
        """
        weight = self._last_weight
        if weight is None:
            weight = micro_batches.num_samples if isinstance(micro_batches, Window) else 1.0
        return 2.0 ** -round(math.log2(weight)) if math.isfinite(weight) and weight > 0 else 1.0

    def clear_gradients(self) -> None:
        """Sets all gradients to zero. `step()` does so by itself."""
        # In place: DDP's buckets stay the gradients' home, and a parameter without a part in this window is treated
        # alike (a zero gradient) by every strategy.
        parameters = [*self._parameters, *(p for g in self.optimizer.param_groups for p in g["params"])]
        gradients = list({id(p): p.grad for p in parameters if p.grad is not None}.values())
        if gradients:
            torch._foreach_zero_(local_parts(gradients))

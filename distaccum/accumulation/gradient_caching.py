"""Losses that couple all samples of a window (contrastive ones), accumulated exactly, by gradient caching.

Such a loss is no sum over micro-batches. But it depends on the model through the embeddings of the window's samples
alone, and those are small. So (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup"):

1. embed every micro-batch without a graph;
2. gather the embeddings of all ranks, take the loss of the whole window, and its gradient g with respect to them;
3. embed every micro-batch once more, now with a graph, and back-propagate Σ embedding · g.

The gradient is that of the window in one shot, by the chain rule, for any cut; gradients still cross the network once.
The price is one more forward of each micro-batch. What may be random in it is replayed, so that both forwards are the
same; buffers (BatchNorm statistics) change once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sized
from enum import Enum
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.accumulation.accumulator import Accumulator
from distaccum.accumulation.micro_batches import require_equal_micro_steps
from distaccum.accumulation.reevaluation import random_states
from distaccum.accumulation.result import TaskOutput, checked_output
from distaccum.accumulation.totals import require_summable
from distaccum.errors import UserError, require
from distaccum.loaders import Window
from distaccum.runtime.buffers import KeptBuffers
from distaccum.runtime.nested import gather_rows, leaves_of, number_of_rows, rebuilt
from distaccum.runtime.randomness import GlobalStates
from distaccum.strategies import Strategy
from distaccum.strategies.optimizers import refuse_closure
from distaccum.strategies.placeholders import leaves_behind

Embed = Callable[[Any], Any]
Loss = Callable[[Any], TaskOutput]


class Stage(Enum):
    """The next stage of a rank in a window whose loss couples its samples."""

    embedding = "embedding"
    whole_window = "loss of the whole window"
    forward = "forward"
    backward = "backward"
    last_backward = "backward with the gradient sync"

    @property
    def waits(self) -> bool:
        """Whether all ranks meet in it."""
        return self in (Stage.whole_window, Stage.last_backward)


Between = Callable[[Stage, int], None]


def accumulate_coupled(
    accumulator: Accumulator,
    window: Iterable[Any],
    *,
    embed: Embed,
    loss: Loss,
    between: Between = lambda stage, micro_step: None,
) -> None:
    """Takes all micro-steps of a window whose loss couples its samples; `accumulator.step()` follows.

        for window in loader:
            accumulate_coupled(accumulator, window, embed=model, loss=contrastive_loss)
            update = accumulator.step()

    The window's micro-batches are held on the device until it ends: loading them twice would keep the loader's workers
    busy twice, to save what is small beside the activations of even one micro-batch of a large model.

    Args:
        accumulator: as for any other window, with any strategy; with clipping, float16 scaling and all else it does.
        window: a `Window`, or any iterable of micro-batches.
        embed: the embeddings of a micro-batch: a tensor with one row for each sample (whatever its other dimensions),
            or a tuple, list or dictionary of such tensors. What else the loss needs, as labels, may be among them. It
            is called twice for each micro-batch, and must give the same both times. Autocast belongs in here.
        loss: of the embeddings of the whole window, gathered over micro-steps and ranks, in the order of the window
            (cut by length, in another): their sum and weight. Every rank calls it with the same embeddings, so it must
            draw no random numbers. float16 and bfloat16 embeddings come as float32. Its own parameters, if it has
            any, belong into the model: a learnable temperature can multiply the embeddings.
        between: called before each stage, with the stage and the micro-step (from 1); what it raises ends the window.

    Raises:
        UserError: the embeddings or the loss are of another form, or the loss depends on parameters of its own.
    """
    started = time.perf_counter()
    if accumulator.noise_scale is not None:
        raise UserError(
            "the noise scale is not defined for a loss that couples the window's samples: their gradients are not "
            "drawn one by one. Leave insight.noise_scale out."
        )
    refuse_closure(accumulator.optimizer, "gradient caching makes updates")
    require(accumulator.weights is None, _NO_TERMS)
    require_equal_micro_steps(window, accumulator.strategy)
    coupled = _CoupledWindow(accumulator.strategy, embed, loss, between)
    # A window of one micro-batch in all needs no caching.
    is_alone = accumulator.strategy.world_size == 1 and isinstance(window, Sized) and len(window) == 1
    coupled.load(window, embeds=not is_alone)
    if not is_alone:
        between(Stage.whole_window, len(coupled.batches))
        coupled.take_loss()
        torch.clear_autocast_cache()  # weights cast without a graph would be taken again, and get no gradient
    after = random_states(accumulator.strategy)
    held = window.over(coupled.batches) if isinstance(window, Window) else coupled.batches
    with accumulator.window(held, started=started, data_seconds=coupled.data_seconds) as micro_batches:
        for number, batch in enumerate(micro_batches):
            output = coupled.forward(number, batch)
            is_last = number == len(coupled.batches) - 1
            between(Stage.last_backward if is_last else Stage.backward, number + 1)
            accumulator.backward(output.loss_sum, output.weight, output.sums)
    if not is_alone:
        after.put_back()


def in_float32(embeddings: Any) -> Any:
    """Embeddings in float32 at least, as the loss of a whole window gets them."""
    # Their gradients are cached unscaled, which float16 has no room for.
    halves = (torch.float16, torch.bfloat16)
    return rebuilt(embeddings, [leaf.float() if leaf.dtype in halves else leaf for leaf in leaves_of(embeddings)])


class _CoupledWindow:
    """This rank's micro-batches of a window, their embeddings, and the loss of the whole window."""

    def __init__(self, strategy: Strategy, embed: Embed, loss: Loss, between: Between) -> None:
        self._strategy = strategy
        self._embed, self._loss, self._between = embed, loss, between
        self.batches: list[Any] = []
        self.data_seconds = 0.0
        self._states: list[GlobalStates] = []
        """Random states before each micro-step."""
        self._rows: list[int] = []
        """Number of embeddings of each micro-step; 0 of a placeholder."""
        self._form: Any = None
        """The last micro-batch's embeddings, as the model returned them: a nest to build others like."""
        self._leaves: list[list[Tensor]] = []
        """Embeddings of each micro-step, without a graph."""
        self._output: TaskOutput | None = None

    def load(self, window: Iterable[Any], *, embeds: bool) -> None:
        """Loads the micro-batches; embeds each without a graph as it comes, or leaves that to `forward`."""
        sizes = window.sizes if isinstance(window, Window) else None
        batches = iter(window)
        self._strategy.share_buffers()  # the same on all ranks, if the strategy keeps them so
        buffers = KeptBuffers(self._strategy.module)
        try:
            while True:
                asked = time.perf_counter()
                batch = next(batches, _END)
                self.data_seconds += time.perf_counter() - asked
                if batch is _END:
                    break
                self.batches.append(batch)
                self._states.append(random_states(self._strategy))
                self._between(Stage.embedding, len(self.batches))
                if embeds:
                    with torch.no_grad():
                        rows = self._embed(batch)
                    self._keep(rows, is_placeholder=sizes is not None and sizes[len(self.batches) - 1] == 0)
        finally:
            buffers.put_back()
        if not self.batches:
            raise RuntimeError("the window has no micro-batch: has it been iterated over before?")

    def _keep(self, rows: Any, *, is_placeholder: bool) -> None:
        """Notes the embeddings of the next micro-step."""
        self._form = rows
        self._rows.append(0 if is_placeholder else number_of_rows(rows))
        self._leaves.append([leaf.detach()[: self._rows[-1]] for leaf in leaves_of(in_float32(rows))])

    def take_loss(self) -> None:
        """Computes the loss of the whole window, and its gradient with respect to this rank's embeddings."""
        mine = [torch.cat(parts) for parts in zip(*self._leaves, strict=True)]
        leaves, start = gather_rows(mine, self._strategy.process_group)
        for leaf in leaves:
            leaf.requires_grad_(leaf.is_floating_point() or leaf.is_complex())
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.enable_grad():
            output = checked_output(self._loss(rebuilt(self._form, leaves)), "the loss of the whole window")
        require_summable(output.loss_sum, output.weight)
        require(not output.terms, _NO_TERMS)
        self._output = output
        _refuse_parameters(output.loss_sum, leaves)
        # Total loss and weight are those of the whole window, so one micro-step of all ranks reports them.
        steps_with_rows = [number for number, rows in enumerate(self._rows) if rows]
        self._reporting_step = steps_with_rows[0] if start == 0 and steps_with_rows else None
        # Embeddings that are not finite are reported by their own micro-steps, so that the message names their rank.
        finite = torch.stack([leaf.isfinite().all() for leaf in wanted]).all()
        self._reported = torch.where(finite, output.loss_sum.detach(), 0.0)
        found = iter(torch.autograd.grad(output.loss_sum, wanted, allow_unused=True))
        gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
        self._cached: list[list[Tensor | None]] = [
            [None if gradient is None else gradient[begin:end] for gradient in gradients]
            for begin, end in pairwise(accumulate(self._rows, initial=start))
        ]

    def forward(self, number: int, batch: Any) -> TaskOutput:
        """Embeds a micro-batch with a graph; returns what to back-propagate in its micro-step."""
        self._between(Stage.forward, number + 1)
        if self._output is not None:
            self._states[number].put_back()
        rows = self._embed(batch)
        if self._output is None:
            self._keep(rows, is_placeholder=False)
            self.take_loss()
        return self._surrogate(number, leaves_of(in_float32(rows)))

    def _surrogate(self, number: int, embeddings: list[Tensor]) -> TaskOutput:
        """A loss whose gradient is the window's, and whose value is this micro-step's part of the window's loss."""
        assert self._output is not None
        rows = self._rows[number]  # none of a placeholder, whose loss the accumulator replaces
        # A leaf that the loss doesn't use gets a gradient of zero, so that the model's parameters all get one.
        products = [
            (leaf * (gradient.conj() if gradient is not None and rows else 0.0)).sum().real
            for leaf, gradient in zip(embeddings, self._cached[number], strict=True)
            if leaf.requires_grad
        ]
        if not products:
            raise UserError("the embeddings have no gradient: are they detached from the model?")
        finite = torch.stack([leaf.detach().isfinite().all() for leaf in embeddings if leaf.requires_grad]).all()
        reports = number == self._reporting_step
        value = torch.where(finite, self._reported if reports else torch.zeros_like(self._reported), torch.nan)
        zeros = {name: torch.zeros_like(entry) for name, entry in self._output.sums.items()}
        return TaskOutput(
            loss_sum=_ValueOf.apply(torch.stack(products).sum(), value),  # type: ignore[no-untyped-call]
            weight=self._output.weight if reports else 0.0,
            sums=self._output.sums if reports else zeros,
        )


_END = object()
_NO_TERMS = (
    "gradient caching does not support terms: the loss of the whole window sees all of its samples, so it can divide "
    "each part by what belongs to it. Return loss_sum + coefficient * weight * (mean of the further loss) as loss_sum, "
    "and leave terms and weights out."
)


class _ValueOf(torch.autograd.Function):
    """The gradient of one scalar, with the value of another: by adding differences, NaN would spread."""

    @staticmethod
    def forward(ctx: Any, gradient_of: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _refuse_parameters(loss_sum: Tensor, embeddings: list[Tensor]) -> None:
    """Gradients of the loss's own parameters would be lost without a word."""
    known = {id(leaf) for leaf in embeddings}
    for leaf in leaves_behind(loss_sum):
        if id(leaf) not in known:
            kind = "parameter" if isinstance(leaf, nn.Parameter) else "tensor"
            raise UserError(
                f"the loss of the whole window depends on a {kind} of its own, of shape {list(leaf.shape)}, "
                "whose gradient would be lost. Let the model's embeddings carry it: a learnable temperature multiplies "
                "them by its root (as model=encoder does with model.learn_temperature=true), any other can be among "
                "them, expanded to one row for each sample."
            )

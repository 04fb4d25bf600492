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
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from enum import Enum
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.accumulation.accumulator import Accumulator
from distaccum.accumulation.open_window import require_equal_micro_steps
from distaccum.accumulation.result import TaskOutput, checked_output
from distaccum.errors import UserError
from distaccum.loaders import Window
from distaccum.runtime.buffers import KeptBuffers
from distaccum.runtime.nested import gather_rows, leaves_of, number_of_rows, rebuilt
from distaccum.runtime.randomness import GlobalStates
from distaccum.strategies import Strategy
from distaccum.strategies.placeholders import leaves_behind

Embed = Callable[[Any], Any]
Loss = Callable[[Any], TaskOutput]


class Stage(Enum):
    """What a rank does next in a window whose loss couples its samples."""

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
    """All micro-steps of a window whose loss couples its samples; `accumulator.step()` follows.

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
        between: told what comes next, and in which micro-step; what it raises ends the window.

    Raises:
        UserError: the embeddings or the loss are of another form, or the loss depends on parameters of its own.
    """
    started = time.perf_counter()
    strategy = accumulator.strategy
    if accumulator.noise_scale is not None:
        raise UserError(
            "the noise scale can't be told of a loss that couples the window's samples: their gradients are not drawn "
            "one by one. Leave insight.noise_scale out."
        )
    require_equal_micro_steps(window, strategy)
    # A window of one micro-batch in all needs no caching.
    is_alone = strategy.world_size == 1 and isinstance(window, Sized) and len(window) == 1
    first, whole = _FirstPass(strategy), None
    with _buffers_unchanged(strategy):
        first.load(window, between, None if is_alone else embed)
    if not is_alone:
        between(Stage.whole_window, len(first.batches))
        whole = _WholeWindow(first, loss)
        torch.clear_autocast_cache()  # weights cast without a graph would be taken again, and get no gradient
    after = _random_states(strategy)
    held = _held_again(window, first.batches)
    with accumulator.window(held, started=started, data_seconds=first.data_seconds) as micro_batches:
        for number, batch in enumerate(micro_batches):
            between(Stage.forward, number + 1)
            if whole is not None:
                first.states[number].put_back()
            rows = embed(batch)
            if whole is None:
                first.keep(rows)
                whole = _WholeWindow(first, loss)
            output = whole.surrogate(number, _in_float32(leaves_of(rows)))
            is_last = number == len(first.batches) - 1
            between(Stage.last_backward if is_last else Stage.backward, number + 1)
            accumulator.backward(output.loss_sum, output.weight, output.sums)
    if not is_alone:
        after.put_back()


def in_float32(embeddings: Any) -> Any:
    """Embeddings in float32 at least, as the loss of a whole window gets them."""
    return rebuilt(embeddings, _in_float32(leaves_of(embeddings)))


def _in_float32(leaves: list[Tensor]) -> list[Tensor]:
    # Their gradients are cached unscaled, which float16 has no room for.
    return [leaf.float() if leaf.dtype in (torch.float16, torch.bfloat16) else leaf for leaf in leaves]


class _FirstPass:
    """This rank's embeddings, without a graph."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.batches: list[Any] = []
        self.states: list[GlobalStates] = []
        self.rows: list[int] = []
        """Of each micro-step; none of a placeholder."""
        self.form: Any = None
        """Embeddings of the last micro-batch: what a nest of them looks like."""
        self.leaves: list[list[Tensor]] = []
        """Of each micro-step."""
        self.data_seconds = 0.0

    def load(self, window: Iterable[Any], between: Between, embed: Embed | None) -> None:
        """Loads the micro-batches, and embeds each at once, if it is to be."""
        sizes = window.sizes if isinstance(window, Window) else None
        batches = iter(window)
        while True:
            asked = time.perf_counter()
            batch = next(batches, _END)
            self.data_seconds += time.perf_counter() - asked
            if batch is _END:
                break
            self.batches.append(batch)
            self.states.append(_random_states(self.strategy))
            between(Stage.embedding, len(self.batches))
            if embed is not None:
                with torch.no_grad():
                    rows = embed(batch)
                self.keep(rows, is_placeholder=sizes is not None and sizes[len(self.batches) - 1] == 0)
        if not self.batches:
            raise RuntimeError("the window has no micro-batch: has it been iterated over before?")

    def keep(self, rows: Any, *, is_placeholder: bool = False) -> None:
        """Notes the embeddings of the next micro-step."""
        self.form = rows
        count = number_of_rows(rows)
        self.rows.append(0 if is_placeholder else count)
        self.leaves.append([leaf.detach()[: self.rows[-1]] for leaf in _in_float32(leaves_of(rows))])


_END = object()


class _WholeWindow:
    """The embeddings of all micro-steps and ranks, and their loss."""

    def __init__(self, first: _FirstPass, loss: Loss) -> None:
        self._rows = first.rows
        mine = [torch.cat(parts) for parts in zip(*first.leaves, strict=True)]
        self._leaves, self._start = gather_rows(mine, first.strategy.process_group)
        for leaf in self._leaves:
            leaf.requires_grad_(leaf.is_floating_point() or leaf.is_complex())
        with torch.enable_grad():
            self._output = _checked(loss(rebuilt(first.form, self._leaves)))
        _refuse_parameters(self._output.loss_sum, self._leaves)
        # Total loss and weight are known as a whole, and are told by one micro-step of all ranks.
        steps_with_rows = [number for number, rows in enumerate(first.rows) if rows]
        self._teller = steps_with_rows[0] if self._start == 0 and steps_with_rows else None
        finite = [leaf.isfinite().all() for leaf in self._leaves if leaf.requires_grad]
        # Embeddings that are not finite are told where they are, so that the message names the right rank.
        self._told = torch.where(torch.stack(finite).all(), self._output.loss_sum.detach(), 0.0)
        self._cached = self._gradients()

    def _gradients(self) -> list[list[Tensor | None]]:
        """With respect to the embeddings of each of this rank's micro-steps."""
        wanted = [leaf for leaf in self._leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(self._output.loss_sum, wanted, allow_unused=True))
        whole = [next(found) if leaf.requires_grad else None for leaf in self._leaves]
        places = list(accumulate(self._rows, initial=self._start))
        return [
            [None if gradient is None else gradient[start:stop] for gradient in whole]
            for start, stop in pairwise(places)
        ]

    def surrogate(self, number: int, embeddings: list[Tensor]) -> TaskOutput:
        """What to back-propagate in a micro-step: its gradient is the window's, its value this step's part of it."""
        rows = self._rows[number]  # none of a placeholder, whose loss the accumulator replaces
        # A leaf that the loss doesn't use gets a gradient of zero, so that the model's parameters all get one.
        products = [
            (leaf * (gradient.conj() if gradient is not None and rows else 0.0)).sum().real
            for leaf, gradient in zip(embeddings, self._cached[number], strict=True)
            if leaf.requires_grad
        ]
        if not products:
            raise UserError("the embeddings have no gradient: are they detached from the model?")
        surrogate = torch.stack(products).sum()
        finite = torch.stack([leaf.detach().isfinite().all() for leaf in embeddings if leaf.requires_grad]).all()
        is_teller = number == self._teller
        share = torch.where(finite, self._told if is_teller else torch.zeros_like(self._told), torch.nan)
        return TaskOutput(
            loss_sum=_ValueOf.apply(surrogate, share),  # type: ignore[no-untyped-call]
            weight=self._output.weight if is_teller else 0.0,
            sums=self._output.sums if is_teller else self._zero_sums(),
        )

    def _zero_sums(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in self._output.sums.items()}


class _ValueOf(torch.autograd.Function):
    """The gradient of one scalar, with the value of another: by adding differences, NaN would spread."""

    @staticmethod
    def forward(ctx: Any, gradient_of: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _checked(output: Any) -> TaskOutput:
    found = checked_output(output, "the loss of the whole window")
    if found.loss_sum.ndim != 0 or not found.loss_sum.requires_grad:
        raise UserError(
            f"loss_sum must be a scalar tensor that depends on the embeddings; got shape "
            f"{tuple(found.loss_sum.shape)}, requires_grad={found.loss_sum.requires_grad}."
        )
    return found


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


def _random_states(strategy: Strategy) -> GlobalStates:
    """The states of all generators that a forward on this rank may draw from."""
    if isinstance(strategy.model, nn.DataParallel):
        return GlobalStates.now(strategy.model.device_ids)
    return GlobalStates.now([strategy.device] if strategy.device.type == "cuda" else [])


@contextmanager
def _buffers_unchanged(strategy: Strategy) -> Iterator[None]:
    """Puts buffers back to what they were, the same on all ranks if the strategy keeps them so."""
    strategy.share_buffers()
    before = KeptBuffers(strategy.module)
    try:
        yield
    finally:
        before.put_back()


def _held_again(window: Iterable[Any], batches: list[Any]) -> Iterable[Any]:
    """The window once more, of micro-batches that have been loaded."""
    if not isinstance(window, Window):
        return batches
    return Window(
        epoch=window.epoch,
        index=window.index,
        number=window.number,
        num_samples=window.num_samples,
        sizes=window.sizes,
        batches=iter(batches),
        sample_indices=lambda: window.sample_indices,
        equal_micro_steps=window.equal_micro_steps,
    )

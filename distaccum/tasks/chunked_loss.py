"""Takes the loss inside a model's head, in chunks, so that its logits never exist.

The wrapped model (DDP, FSDP) is called as ever, because its hooks gather parameters and synchronise gradients; only the
forward of its last linear layer is replaced for that call. What it returns in the place of logits is the loss, which
the model hands on, and which refuses everything that a model may compute on logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

from distaccum.errors import UserError
from distaccum.models.gpt import TiedHead
from distaccum.models.outputs import logits_of
from distaccum.strategies.dp import ThreadedReplicas
from distaccum.tasks.linear_cross_entropy import ChunkedLoss, linear_cross_entropy_sum

_INSTEAD = "Take whole logits instead: task.chunked_loss=false."


class HeadLoss(NamedTuple):
    """The result of `loss_in_head`.

    Attributes:
        loss_sum: summed cross-entropy, in float32 at least.
        losses: of each target, without weights and without a gradient; 0 where it is ignored.
        predicted: the class with the largest logit, for each target.
        output: what the model returned, with something that is of no use in the place of logits.
    """

    loss_sum: Tensor
    losses: Tensor
    predicted: Tensor
    output: Any


def loss_in_head(
    model: nn.Module,
    call: Callable[[], Any],
    targets: Tensor,
    *,
    row_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> HeadLoss:
    """Calls a model whose head computes the loss in chunks, in the place of logits.

    Args:
        model: wrapped or not. It, or the module inside it, has `get_output_embeddings()`, which returns its last layer:
            a `torch.nn.Linear` or a `distaccum.models.TiedHead`.
        call: calls the model once, with what it needs for logits alone (no `labels`), and returns its output.
        targets: integers of the shape of the logits without their last dimension: for each place the class that its
            logits are compared with, so one token ahead of the inputs.
        row_weights: what the loss of each target is multiplied by, of the shape of the targets.
        ignore_index, label_smoothing, chunk: as in `linear_cross_entropy_sum`.

    Raises:
        UserError: the model has no such head, doesn't call it exactly once with one row for each target, or computes
            something on its logits (scales, caps or slices them); or as `linear_cross_entropy_sum`.
    """
    head = head_of(model)
    seen: list[ChunkedLoss] = []

    def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if seen:
            raise UserError(f"the model calls its head {type(head).__name__} several times in a forward. {_INSTEAD}")
        if hidden.shape[:-1] != targets.shape:
            raise UserError(
                f"the model computes logits of {list(hidden.shape[:-1])} places, and the targets are "
                f"{list(targets.shape)}: there must be one target for each."
            )
        found = linear_cross_entropy_sum(
            hidden.flatten(0, -2),
            weight,
            targets.flatten(),
            bias=bias,
            row_weights=None if row_weights is None else row_weights.flatten(),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            chunk=chunk,
        )
        seen.append(found)
        function: Any = _HandedOn
        handed_on: Tensor = function.apply(found.loss_sum)
        return handed_on

    with _replaced(head, loss_of):
        output = call()
    if not seen:
        raise UserError(f"the model has computed its output without its head, {type(head).__name__}. {_INSTEAD}")
    handed_on = logits_of(output)
    if not isinstance(handed_on, _NoLogits):
        raise UserError(f"the model does not return what its head, {type(head).__name__}, computes. {_INSTEAD}")
    losses, predicted = seen[0].losses.view_as(targets), seen[0].predicted.view_as(targets)
    return HeadLoss(handed_on.as_subclass(Tensor), losses, predicted, output)


def head_of(model: nn.Module) -> nn.Module:
    """Returns the layer of a model that computes its logits.

    Raises:
        UserError: it has none that a loss can be taken in.
    """
    if isinstance(model, nn.DataParallel | ThreadedReplicas):
        raise UserError(
            "task.chunked_loss=true does not support strategy=dp, which scatters a model's inputs but not the targets. "
            "Set strategy=ddp, or single."
        )
    inner: Any = model
    while isinstance(inner, DistributedDataParallel) or hasattr(inner, "_orig_mod"):  # that of torch.compile
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner._orig_mod
    named: Callable[[], Any] | None = getattr(inner, "get_output_embeddings", None)
    head = named() if named is not None else None
    if isinstance(head, TiedHead) or (isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward):
        return head
    found = "has no get_output_embeddings()"
    if named is not None:
        found = (
            f"has a {type(head).__module__}.{type(head).__name__} there" if head is not None else "returns None there"
        )
    raise UserError(
        "task.chunked_loss=true needs a model whose get_output_embeddings() returns its last layer, a torch.nn.Linear; "
        f"{type(inner).__name__} {found}. {_INSTEAD}"
    )


_ALLOWED = {
    *("__get__", "__repr__", "dim", "numel", "size", "stride", "storage_offset", "untyped_storage"),
    *("as_subclass", "clone", "contiguous", "float", "register_hook", "to", "view_as"),
}
"""What may be done with the loss that stands in the place of logits."""


class _NoLogits(Tensor):
    """The loss, handed through the rest of a model in the place of logits. Refuses to be computed with.

    What wrappers do with any output is allowed: DDP copies it, FSDP attaches a hook to it and may convert it,
    torch.compile asks for its properties.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        is_question = name.startswith("is_") or (name.startswith("_") and not name.startswith("__"))
        if name not in _ALLOWED and not is_question:
            raise UserError(
                f"the model computes something on its logits ({name.strip('_')}), which a loss in chunks does not "
                f"have: a scale or a cap of logits changes the loss. {_INSTEAD}"
            )
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class _HandedOn(Function):
    """Makes it of the loss. No view, as `as_subclass` makes: of those, FSDP warns."""

    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor) -> Tensor:
        handed_on: Tensor = Tensor._make_subclass(_NoLogits, loss_sum.clone())
        return handed_on

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Replacement:
    """A forward for a head. One object for each head, as compiled models are compiled anew for another one."""

    def __init__(self) -> None:
        self.head: Any = None
        self.loss_of: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
        self.forward = torch.compiler.disable(self._forward)  # type: ignore[no-untyped-call]

    def _forward(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        assert self.loss_of is not None
        if isinstance(self.head, TiedHead):
            assert weight is not None
            return self.loss_of(hidden, weight, None)
        return self.loss_of(hidden, self.head.weight, self.head.bias)


_REPLACEMENTS: WeakKeyDictionary[nn.Module, _Replacement] = WeakKeyDictionary()


@contextmanager
def _replaced(head: nn.Module, loss_of: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Iterator[None]:
    """Has a head return what a function makes of inputs, weight and bias. Its hooks are called as ever."""
    replacement = _REPLACEMENTS.setdefault(head, _Replacement())
    replacement.head, replacement.loss_of = head, loss_of
    before = vars(head).get("forward")
    head.forward = replacement.forward
    try:
        yield
    finally:
        replacement.head = replacement.loss_of = None
        if before is None:
            del head.forward
        else:
            head.forward = before

"""The cross-entropy of a linear layer's logits, which never exist whole: for large vocabularies.

Logits of N tokens over a vocabulary of V take N · V numbers, in 16 bits and again in 32 for the softmax, and so do
their gradients. Here they are made for some tokens at a time, and at once turned into the loss and the gradients of the
layer's inputs and parameters, which are kept for the backward. That takes as many operations as without chunks, because
the loss is a sum: its gradient is known but for the factor that the backward brings.

torch's own `linear_cross_entropy`, since torch 2.13, does the same; but its sum is rounded to bfloat16 if its inputs
are, it ignores autocast, and it has neither label smoothing nor weights of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from distaccum.errors import require

_MOST_NUMBERS = 2**27
"""Logits that exist at a time, unless the caller says otherwise: 512 MiB of float32."""

_LEAST_ROWS = {"cuda": 512}
"""Rows at a time below which a GPU waits for its memory: each chunk reads and writes the gradient of the weight."""

_AMPLIFIED = 1024.0
"""In float16, gradients of logits (between -1 and 1) lose digits below 6e-5, so there they are multiplied by this."""


class ChunkedLoss(NamedTuple):
    """The result of `linear_cross_entropy_sum`.

    Attributes:
        loss_sum: the sum, a scalar in float32 at least, with a gradient.
        losses: `[N]`, without weights and without a gradient; 0 where the target is ignored.
        predicted: `[N]`, the class with the largest logit.
    """

    loss_sum: Tensor
    losses: Tensor
    predicted: Tensor


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    row_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> ChunkedLoss:
    """Returns the summed cross-entropy of `F.linear(hidden, weight, bias)`, without these logits ever being whole.

    It is the loss, with the gradients, of `F.cross_entropy(F.linear(hidden, weight, bias).float(), targets,
    reduction="sum", …)`. Under autocast the products are taken in its format, all else in float32 at least, the sums of
    gradients over chunks too.

    Between forward and backward it keeps the gradients, in float32 at least: one buffer of the shape of each tensor
    that requires one. A backward takes them, so there can be one. It can't be differentiated twice.

    Args:
        hidden: `[N, width]`.
        weight: `[V, width]`.
        targets: integers `[N]`, from 0 to V - 1, or `ignore_index`.
        bias: `[V]`.
        row_weights: `[N]`: what the loss of each row is multiplied by.
        ignore_index: the target of rows that add nothing.
        label_smoothing: probability mass spread over all classes, in [0, 1).
        chunk: rows whose logits exist at a time; default: an eighth of them, but on a GPU 512 at least, and in any
            case no more than have 2²⁷ logits.

    Raises:
        UserError: shapes or formats that don't go together, an impossible option, or, on a CPU, a target that is no
            class. Also from the backward, if it is the second, or makes a graph (`create_graph=True`).
    """
    _require_shapes(hidden, weight, targets, bias, row_weights)
    require(0 <= label_smoothing < 1, f"label_smoothing={label_smoothing} must lie in [0, 1).")
    require(chunk is None or chunk >= 1, f"chunk={chunk} is impossible: it is the number of rows at a time.")
    dtype, device = _format_of_products(hidden, weight), hidden.device.type
    targets = targets.long()
    is_valid = targets != ignore_index
    if device == "cpu":  # on a GPU the device stops: looking at targets would make the host wait
        _require_classes(targets[is_valid], len(weight))
    factors = is_valid.to(torch.promote_types(dtype, torch.float32))
    if row_weights is not None:
        factors = (factors * row_weights.detach()).to(factors.dtype)
    options = _Options(
        dtype=dtype,
        label_smoothing=label_smoothing,
        chunk=chunk or _rows_of_a_chunk(len(hidden), len(weight), device),
        has_gradient=torch.is_grad_enabled(),
    )
    function: Any = _LinearCrossEntropy
    found = function.apply(hidden, weight, bias, targets.masked_fill(~is_valid, 0), is_valid, factors, options)
    return ChunkedLoss(*found)


def _rows_of_a_chunk(rows: int, classes: int, device: str) -> int:
    return max(1, min(max(-(-rows // 8), _LEAST_ROWS.get(device, 1)), _MOST_NUMBERS // classes))


def _format_of_products(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    require(
        weight.dtype == hidden.dtype,
        f"a linear layer needs inputs and a weight of one format, and they are {hidden.dtype} and {weight.dtype}. Use "
        "autocast, or convert one of them.",
    )
    return hidden.dtype


def _require_shapes(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, row_weights: Tensor | None
) -> None:
    tensors = (hidden, weight, targets, bias, row_weights)
    require(
        hidden.dim() == weight.dim() == 2
        and hidden.shape[1] == weight.shape[1]
        and targets.shape == hidden.shape[:1]
        and (bias is None or bias.shape == weight.shape[:1])
        and (row_weights is None or row_weights.shape == targets.shape),
        "a cross-entropy in chunks needs inputs [rows, width], a weight [classes, width], targets [rows], a bias "
        "[classes] or none, weights of rows [rows] or none; got "
        f"{', '.join('none' if tensor is None else str(list(tensor.shape)) for tensor in tensors)}.",
    )


def _require_classes(targets: Tensor, classes: int) -> None:
    wrong = targets[(targets < 0) | (targets >= classes)]
    require(
        not len(wrong),
        f"one of the targets is {wrong[:1].tolist()}, and the model has {classes} outputs. Targets must be integers "
        "from 0 to one below the number of outputs.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """Everything that the function below depends on besides tensors.

    Attributes:
        dtype: of the products.
        chunk: rows at a time.
        has_gradient: whether a backward may follow.
    """

    dtype: torch.dtype
    label_smoothing: float
    chunk: int
    has_gradient: bool

    @property
    def amplified(self) -> float:
        return _AMPLIFIED if self.dtype is torch.float16 else 1.0


class _LinearCrossEntropy(Function):
    """Computes loss and gradients in the forward; the backward multiplies these."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        is_valid: Tensor,
        factors: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            sums = _Sums(
                hidden, weight, bias, options, [options.has_gradient and need for need in ctx.needs_input_grad]
            )
            for start in range(0, len(hidden), options.chunk):
                sums.add(slice(start, start + options.chunk), targets, factors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sums.losses, sums.predicted)
        ctx.save_for_backward(*sums.gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.amplified = options.amplified
        ctx.is_spent = False
        sums.losses.masked_fill_(~is_valid, 0)
        return (sums.losses * factors).sum(), sums.losses, sums.predicted

    @staticmethod
    def backward(ctx: Any, factor: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        require(
            not torch.is_grad_enabled(),
            "a cross-entropy in chunks can't be differentiated twice (create_graph=True). Take whole logits "
            "(task.chunked_loss=false).",
        )
        require(
            not ctx.is_spent,
            "a cross-entropy in chunks has had its backward, which takes what was kept for it (retain_graph=True keeps "
            "no second copy). Take the forward again, or whole logits (task.chunked_loss=false).",
        )
        if factor is None:
            return (None,) * 7
        ctx.is_spent = True
        gradients = [
            None if kept is None else _times(kept, factor / ctx.amplified, dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None


class _Sums:
    """Losses and predictions of all chunks, and the sums of their gradients.

    Attributes:
        gradients: of inputs, weight and bias, None of what needs none; multiplied by the options' `amplified`.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _Options, needed: list[bool]
    ) -> None:
        self._hidden = hidden
        self._matrix = weight.to(options.dtype)
        self._offset = None if bias is None else bias.to(options.dtype)
        self._options = options
        self._wide = torch.promote_types(options.dtype, torch.float32)
        self.losses = hidden.new_empty(len(hidden), dtype=self._wide)
        self.predicted = hidden.new_empty(len(hidden), dtype=torch.int64)
        self.gradients: list[Tensor | None] = [None, None, None]
        for place, tensor in enumerate((hidden, weight, bias)):
            if tensor is not None and needed[place]:
                # float16 can't hold them before the backward's factor, and each format would be rounded to twice.
                dtype = torch.promote_types(tensor.dtype, torch.float32)
                self.gradients[place] = torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)

    def add(self, part: slice, targets: Tensor, factors: Tensor) -> None:
        """Adds the chunk of some rows."""
        rows, target = self._hidden[part].to(self._options.dtype), targets[part].unsqueeze(1)
        factor, smoothing = factors[part].unsqueeze(1), self._options.label_smoothing
        logits = F.linear(rows, self._matrix, self._offset)
        torch.argmax(logits, 1, out=self.predicted[part])
        numbers = torch.log_softmax(logits, 1, dtype=self._wide)
        del logits
        losses = (smoothing - 1) * numbers.gather(1, target)
        if smoothing:
            losses -= smoothing * numbers.mean(1, keepdim=True)
        self.losses[part] = losses.squeeze(1)
        if any(gradient is not None for gradient in self.gradients):
            numbers.exp_()
            if smoothing:
                numbers.sub_(smoothing / numbers.shape[1])
            numbers.scatter_add_(1, target, torch.full_like(factor, smoothing - 1))
            self._add_gradients(part, rows, _times(numbers, factor * self._options.amplified, rows.dtype))

    def _add_gradients(self, part: slice, rows: Tensor, gradient: Tensor) -> None:
        """Adds what follows from the gradient of a chunk's logits."""
        of_hidden, of_weight, of_bias = self.gradients
        if of_hidden is not None:
            _add_product(gradient, self._matrix, of_hidden[part])
        if of_weight is not None:
            _add_product(gradient.T, rows, of_weight)
        if of_bias is not None:
            of_bias += gradient.sum(0, dtype=of_bias.dtype)


def _times(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies in place where the format stays, else in one pass, without another buffer of the tensor's format."""
    if tensor.dtype == dtype:
        return tensor.mul_(factor)
    return torch.mul(tensor, factor, out=torch.empty(tensor.shape, dtype=dtype, device=tensor.device))


def _add_product(left: Tensor, right: Tensor, total: Tensor) -> None:
    """Adds a matrix product to a tensor of float32 at least, without rounding between."""
    if total.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))

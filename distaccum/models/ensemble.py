"""Combines models: their predictions, or their weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.config.enums import Combination
from distaccum.errors import UserError
from distaccum.models.outputs import logits_of


class NotTogetherError(UserError, AttributeError):
    """Models can't be combined: their outputs, or those that are asked for, have no mean."""


class _OnlyLogits(dict[str, Tensor]):
    """Output of an ensemble of models whose outputs have names: `logits`, as an item and as an attribute.

    Args:
        are_first: `output[0]` is the logits too, as it is in the members' outputs.
    """

    def __init__(self, logits: Tensor, *, are_first: bool) -> None:
        super().__init__(logits=logits)
        self._first = logits if are_first else None

    def __missing__(self, name: object) -> Tensor:
        if name == 0 and self._first is not None:
            return self._first
        raise NotTogetherError(
            f"an ensemble has only the logits of its members' outputs, and {name!r} is asked for. Have the task make "
            "its loss of the logits, or combine the weights (--combine weights)."
        )

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class Ensemble(nn.Module):
    """A model whose output is a mean of several models' outputs. It takes the same arguments as each of them.

    With `probabilities` the output is the logarithm of the mean of the models' probabilities (softmax over the
    classes), which any cross-entropy takes as logits. It is computed in float32 at least. With `outputs` it is the mean
    of the outputs.

    At most two models' outputs are in memory at a time.

    Args:
        members: take the same arguments, and return logits of the same shape each, in any form that `logits_of` reads.
            Where that is a tuple, the ensemble returns a tuple of the logits alone; where it has names, a mapping with
            `logits` alone, which are an attribute too.
        combine: `probabilities` or `outputs`.
        class_dim: dimension of the classes in the outputs, for `probabilities`.

    Raises:
        UserError: there are no members; and from a call, outputs that can't be combined.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        combine: Combination = Combination.probabilities,
        class_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not members:
            raise UserError("an ensemble needs at least one model, and got none.")
        if combine is Combination.probabilities and class_dim is None:
            raise NotTogetherError(
                "the mean of probabilities needs the dimension of the classes in the outputs: give class_dim "
                "(--class-dim), or combine the outputs as they are (--combine outputs)."
            )
        if combine is Combination.weights:
            raise UserError("weights are combined by mean_of_weights, not by an Ensemble of outputs.")
        self.members = nn.ModuleList(members)
        self._combine = combine
        self._class_dim = class_dim

    def forward(self, *arguments: Any, **named: Any) -> Any:
        total: Tensor | None = None
        is_probabilities = self._combine is Combination.probabilities
        for member in self.members:
            output = member(*arguments, **named)
            try:
                own = logits_of(output)
            except UserError as error:
                raise NotTogetherError(f"an ensemble needs each model's logits: {error}") from error
            part = self._part(own)
            if total is not None and part.shape != total.shape:
                raise NotTogetherError(
                    f"the members' outputs can't be combined: they are of shapes {list(total.shape)} and "
                    f"{list(part.shape)}."
                )
            total = part if total is None else torch.logaddexp(total, part) if is_probabilities else total + part
        assert total is not None
        count = len(self.members)
        mean = total - math.log(count) if is_probabilities else total / count
        if own is output:
            return mean
        is_tuple = isinstance(output, tuple | list) and not hasattr(output, "logits")
        return (mean,) if is_tuple else _OnlyLogits(mean, are_first=_first(output) is own)

    def _part(self, output: Tensor) -> Tensor:
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        if self._combine is Combination.outputs:
            return wide
        assert self._class_dim is not None
        if not -wide.ndim <= self._class_dim < wide.ndim:
            raise NotTogetherError(
                f"class_dim={self._class_dim} is no dimension of outputs of shape {list(wide.shape)}: give the one "
                "of the classes."
            )
        return wide.log_softmax(self._class_dim)


def _first(output: Any) -> Any:
    try:
        return output[0]
    except (LookupError, TypeError):
        return None


def mean_of_weights(members: Sequence[nn.Module]) -> nn.Module:
    """Returns a model whose weights are the mean of several models' (a "model soup", Wortsman et al. 2022).

    Floating-point buffers, as BatchNorm's statistics, are averaged like weights; other buffers and extra state are the
    first model's. Sums are taken in float64.

    Raises:
        UserError: the models' weights have other names or shapes.
    """
    states = [
        {name: value for name, value in member.state_dict().items() if isinstance(value, Tensor)} for member in members
    ]
    for number, state in enumerate(states[1:], 2):
        different = sorted(
            name
            for name in states[0].keys() | state.keys()
            if name not in states[0] or name not in state or states[0][name].shape != state[name].shape
        )
        if different:
            raise NotTogetherError(
                f"the weights of models 1 and {number} can't be combined: {different[0]} is not in both with the "
                "same shape. Only models of one architecture have a mean of weights; combine their outputs or "
                "probabilities instead."
            )
    mixed = copy.deepcopy(members[0])
    target = mixed.state_dict()
    for name in states[0]:
        value = target[name]
        if value.is_floating_point() or value.is_complex():
            wide = torch.promote_types(value.dtype, torch.float64)
            value.copy_(torch.stack([state[name].to(wide) for state in states]).mean(dim=0))
    return mixed

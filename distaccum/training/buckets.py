"""Steps of optimizers whose temporaries are those of a bucket of parameters, not of all of them.

torch's `foreach` implementations take each of their operations over all parameters at once, and so make temporaries
once or twice as large as all parameters: Adadelta's changes, say, or RMSprop's denominators. The fused ones make none.
Where torch has no fused one, parameters are stepped in buckets: the numbers are the same, as no optimizer here looks at
more than one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from distaccum.strategies import local_parts

BUCKET_BYTES = 25 * 2**20
"""The most that temporaries of a step take, if no parameter is larger: as much as DDP's buckets do by default."""
_MOST_TEMPORARIES = 2
"""Of each parameter, in any of the optimizers."""


def in_buckets(parameters: Sequence[Any]) -> Iterator[list[Any]]:
    """Splits parameters, in their order, into lists whose temporaries fit in a bucket on this rank.

    A parameter that is too large by itself is alone.
    """
    bucket: list[Any] = []
    held = 0
    for parameter, part in zip(parameters, local_parts(parameters), strict=True):
        if bucket and _MOST_TEMPORARIES * (held + part.nbytes) > BUCKET_BYTES:
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += part.nbytes
    if bucket:
        yield bucket


def fit_in_a_bucket(parameters: Sequence[Tensor]) -> bool:
    """Whether temporaries of a step of all these parameters at once fit in a bucket on this rank."""
    return _MOST_TEMPORARIES * sum(part.nbytes for part in local_parts(parameters)) <= BUCKET_BYTES


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """Returns what the closure of a step returns; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def step_in_buckets(optimizer: torch.optim.Optimizer) -> None:
    """Makes the `step` of one of torch's own optimizers step its parameters bucket by bucket.

    Hooks of the step are called once, around the whole. For optimizers alone whose groups hold settings and no state,
    as torch's do.
    """
    whole: Callable[..., Any] = type(optimizer).step
    # Without the hooks, which torch wraps around the step of a class.
    whole = whole.__wrapped__ if getattr(whole, "hooked", False) else whole  # type: ignore[attr-defined]

    def step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        loss = evaluated(closure)
        groups = self.param_groups
        try:
            for group in groups:
                for bucket in in_buckets(group["params"]):
                    self.param_groups = [{**group, "params": bucket}]
                    whole(self)
        finally:
            self.param_groups = groups
        return loss

    optimizer.step = MethodType(torch.optim.Optimizer.profile_hook_step(step), optimizer)  # type: ignore[method-assign]

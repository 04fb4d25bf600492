"""Optimizers of any class: their own state under ZeRO-1, trial steps of others like them, gradients in their format."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.errors import UserError
from distaccum.runtime.sharded import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)


@contextmanager
def in_parameter_format(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Gives the optimizer gradients in the format of their parameters, which optimizers require.

    Only parameters with a `grad_dtype` of their own are touched: bfloat16 ones whose gradients add up in float32. These
    gradients are of no use afterwards, as the narrower ones take their place in memory.
    """
    wide = [
        (parameter, parameter.grad)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and parameter.grad.dtype != parameter.dtype
    ]
    formats = [parameter.grad_dtype for parameter, _ in wide]
    for parameter, gradient in wide:
        parameter.grad = None
        parameter.grad_dtype = None
        parameter.grad = _narrowed(gradient, parameter.dtype)
    try:
        yield
    finally:
        for (parameter, gradient), grad_dtype in zip(wide, formats, strict=True):
            parameter.grad = None
            parameter.grad_dtype = grad_dtype
            parameter.grad = gradient


def _narrowed(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a gradient in another format: in its own memory if that is narrower, so that no more is needed."""
    wide, narrow = gradient.dtype.itemsize, dtype.itemsize
    if is_sharded(gradient) or narrow > wide:
        return gradient.to(dtype)
    result = torch.empty(0, dtype=dtype, device=gradient.device)
    start = gradient.storage_offset() * wide // narrow
    result.set_(gradient.untyped_storage(), start, gradient.size(), gradient.stride())
    return result.copy_(gradient.to(dtype))


def probe_state(
    optimizer: torch.optim.Optimizer, shape: Sequence[int] = (1024,), group: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Returns the state that an optimizer of the same class and settings has for a parameter of a shape after a step.

    The settings are those of a group, by default of the first one. None if no other one can be made: a user's class
    may take arguments that are not in its groups.
    """
    twin = twin_of(optimizer, shape, group)
    return dict(twin.state[twin.param_groups[0]["params"][0]]) if twin is not None else None


def twin_of(
    optimizer: torch.optim.Optimizer, shape: Sequence[int] = (1024,), group: dict[str, Any] | None = None
) -> torch.optim.Optimizer | None:
    """Returns an optimizer of the same class and settings that has stepped one parameter; None as in `probe_state`."""
    probe = nn.Parameter(torch.zeros(tuple(shape)))
    probe.grad = torch.zeros_like(probe)
    try:
        twin: torch.optim.Optimizer = _twin(optimizer, group or optimizer.param_groups[0], probe)
        _step(twin)
    except Exception as error:
        logger.debug("another %s can't be made: %s", type(optimizer).__name__, error)
        return None
    return twin


def _twin(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Any:
    known = inspect.signature(type(optimizer)).parameters
    settings = {key: value for key, value in group.items() if key in known and key != "params"}
    twin = type(optimizer)([parameter], **settings)
    if has_two_modes(twin):
        twin.train()  # type: ignore[attr-defined]
    return twin


def has_two_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it trains with other weights than those to evaluate, which its train() and eval() exchange."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def takes_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer evaluates the loss itself: the `closure` of its `step` has no default, as L-BFGS's."""
    closure = inspect.signature(own_optimizer(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def refuse_closure(optimizer: torch.optim.Optimizer, what: str) -> None:
    """Refuses an optimizer that evaluates the loss itself, in a tool that looks at updates of one gradient.

    Args:
        what: says what the tool does, as a sentence's beginning.

    Raises:
        UserError: it is one.
    """
    if takes_closure(optimizer):
        raise UserError(
            f"{what} of one gradient; {type(own_optimizer(optimizer)).__name__} evaluates the loss as often as it "
            "likes. Set another optim here, sgd for instance."
        )


def _step(optimizer: torch.optim.Optimizer) -> None:
    """Steps with the gradients that are there, whatever the parameters."""
    if takes_closure(optimizer):
        optimizer.step(lambda: torch.zeros((), dtype=torch.float64))  # type: ignore[arg-type, return-value]
    else:
        optimizer.step()


def check_steps(optimizer: torch.optim.Optimizer) -> None:
    """Refuses optimizers whose steps would depend on how state or parameters are sharded. All ranks call it.

    With sharded parameters, steps of a small sharded one are compared with those of a whole one: an optimizer that uses
    more than one number at a time (norms of a tensor, factored moments) may compute with the shard alone.

    Raises:
        UserError: its steps of sharded parameters differ from those of whole ones; or it evaluates the loss itself, and
            each rank's part would see a part of the gradient alone.
    """
    mend = "Set strategy=ddp strategy.shard_optimizer=true, which shards its state over the ranks by whole parameters,"
    if takes_closure(optimizer):
        mend = "Set strategy=ddp"
        if own_optimizer(optimizer) is not optimizer:
            raise UserError(
                f"strategy.shard_optimizer=true (ZeroRedundancyOptimizer) does not support "
                f"{type(own_optimizer(optimizer)).__name__}, which evaluates the loss itself: each rank's part would "
                "step by a part of the gradient, and the loss be evaluated at parameters that differ between ranks. "
                "Leave strategy.shard_optimizer out."
            )
    optimizer = own_optimizer(optimizer)
    name = type(optimizer).__name__
    groups = {parameter.ndim: (group, parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for group, parameter in groups.values():
        if is_sharded(parameter) and (difference := _sharded_difference(optimizer, group, parameter)):
            raise UserError(f"strategy=fsdp does not support {name}: {difference}. {mend} or take another optimizer.")


def _sharded_difference(optimizer: torch.optim.Optimizer, group: dict[str, Any], like: DTensor) -> str:
    from torch.distributed.tensor import distribute_tensor  # takes 0.75 s, and is in use where this is called

    mesh = like.device_mesh
    shape = (2 * mesh.size() + 1, *[3] * (like.ndim - 1))  # shards of unequal size
    start = torch.linspace(-1, 1, math.prod(shape), dtype=like.dtype, device=mesh.device_type).reshape(shape)

    def sharded(tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor.clone(), mesh, like.placements, src_data_rank=None)

    ends: list[Any] = []
    evaluates = takes_closure(optimizer)
    for place in (torch.clone, sharded):
        probe = nn.Parameter(place(start))
        try:
            twin = _twin(optimizer, group, probe)
        except Exception:  # a user's class may take arguments that are not in its groups
            return "no other one can be made from its groups, to try its steps of shards" if evaluates else ""
        try:
            for times in (1, 2):
                probe.grad = place(start.cos() * times)
                if evaluates:
                    twin.step(partial(_loss_around_two, probe, place(start.cos())))
                else:
                    twin.step()
        except Exception as error:
            sentence = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
            return shorten(sentence, 200, placeholder=" …") or type(error).__name__
        ends.append(probe.detach())
    difference = (ends[1].to_local() - sharded(ends[0]).to_local()).norm()
    part = (difference / (ends[0] - start).norm()).double()
    dist.all_reduce(part, dist.ReduceOp.MAX, group=mesh.get_group(mesh.ndim - 1))  # of the shards
    return f"its steps of shards differ from those of the whole by {float(part):.1e} of them" if part > 1e-5 else ""


def _loss_around_two(probe: Tensor, weight: Tensor) -> Tensor:
    """Returns Σ weight · (probe - 2)² / 2, and leaves its gradient in `probe.grad`."""
    distance = probe.detach() - 2
    probe.grad = weight * distance
    losses = weight * distance.square() / 2
    return (losses.full_tensor() if is_sharded(losses) else losses).sum()


def own_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Returns the optimizer that holds this rank's state: the inner one of a `ZeroRedundancyOptimizer`, else itself."""
    # By name, as importing the class takes long, and gives warnings.
    inner = optimizer.optim if type(optimizer).__name__ == "ZeroRedundancyOptimizer" else optimizer  # type: ignore[attr-defined]
    assert isinstance(inner, torch.optim.Optimizer)
    return inner


def accept_changed_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Tells a `ZeroRedundancyOptimizer` that parameters have been frozen or unfrozen, of which it warns otherwise.

    Which rank steps which of them stays as it is.
    """
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        sharded: Any = optimizer
        sharded._is_trainable_mask = sharded._get_is_trainable_mask()


def complete_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Gives fused SGD a momentum of zero for parameters whose first gradient comes later than that of others.

    torch's fused kernel takes momenta of all parameters or of none. From zero it makes the gradient the momentum, as in
    a first step; not with dampening, which is left as it is.
    """
    optimizer = own_optimizer(optimizer)
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"] or group["dampening"]:
            continue
        stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
        new = [p for p in stepped if optimizer.state.get(p, {}).get("momentum_buffer") is None]
        for parameter in new if len(new) < len(stepped) else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

"""Puts the state of a checkpoint into a model, its optimizer, the generators, and whatever else belongs to a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distaccum.checkpoints.encoding import decoded
from distaccum.checkpoints.folder import Checkpoint
from distaccum.checkpoints.frozen import check_same_frozen
from distaccum.checkpoints.optimizer_state import (
    adopt_group_settings,
    check_same_optimizer,
    optimizer_targets,
    outside_parameters,
    set_optimizer_state,
)
from distaccum.checkpoints.state import (
    also_in,
    check_same_model,
    members_of,
    putting_back,
    read_tensors,
    set_extra_states,
)
from distaccum.checkpoints.storage import ManifestReader
from distaccum.runtime.buffers import persistent_buffers
from distaccum.runtime.randomness import set_random_state
from distaccum.strategies import Strategy


class Stateful(Protocol):
    """An object whose `state_dict()` is made of dictionaries, lists, tuples, strings, numbers, None, small tensors."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


def restore_into(
    checkpoint: Checkpoint,
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    *,
    rank: int,
    group: dist.ProcessGroup | None,
    also: Mapping[str, Mapping[str, Tensor]],
    states: Mapping[str, Stateful],
    settings_at_start: list[dict[str, Any]],
) -> None:
    """Restores all in place, as `Checkpointer.restore` says.

    Args:
        group: the ranks, which all call it. None: this process alone.
        also: further tensors of the run, by kind and name.
        states: further objects of the run, by name.
        settings_at_start: of the optimizer's groups, as they were built.

    Raises:
        UserError: the checkpoint holds another model or another optimizer, or leaves out other frozen weights.
    """
    module, stored = strategy.module, checkpoint.manifest["tensors"]
    formats = ManifestReader(checkpoint).formats()
    strategy.at_rest()
    check_same_model(members_of(module), checkpoint.shapes)
    check_same_optimizer(module, optimizer, checkpoint)
    is_same_layout = checkpoint.state["world_size"] == strategy.world_size
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    check_same_frozen(checkpoint, parameters, group)
    targets = {f"model/{name}": p for name, p in parameters.items() if name not in checkpoint.frozen}
    targets |= {name: p.detach() for name, p in outside_parameters(module, optimizer).items()}
    for name, buffer in persistent_buffers(module):
        own = f"rank/{rank}/buffers/{name}"
        targets[own if is_same_layout and own in stored else f"model/{name}"] = buffer
    targets |= also_in(checkpoint, also, logs=rank == 0)
    optimizer_state = optimizer_targets(module, optimizer, formats)
    mine = f"rank/{rank}/"
    own_state = {
        name: torch.zeros(shape, dtype=dtype)
        for name, (shape, dtype) in formats.items()
        if is_same_layout and name.startswith((f"{mine}random/", f"{mine}strategy/"))
    }
    read_tensors(checkpoint, targets | optimizer_state | own_state, group)
    of_parameters = {name: dtype for name, (_, dtype) in _below(formats, "model/").items()}
    with putting_back(checkpoint, "optimizer"):
        set_optimizer_state(module, optimizer, optimizer_state, of_parameters)
        adopt_group_settings(optimizer, settings_at_start, checkpoint.state["optimizer"])
    with putting_back(checkpoint, "model"):
        set_extra_states(module, checkpoint.state["extra"])
    if own_state:
        with putting_back(checkpoint, "random generators"):
            strategy.load_state_tensors(_below(own_state, f"{mine}strategy/"))
            set_random_state(_below(own_state, f"{mine}random/"), strategy.device)
    for name, entry in states.items():
        if name in checkpoint.state["states"]:
            with putting_back(checkpoint, name):
                entry.load_state_dict(decoded(checkpoint.state["states"][name]))


def _below(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

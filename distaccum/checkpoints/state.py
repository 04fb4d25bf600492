"""What a checkpoint holds of model, optimizer and generators: tensors by name, whatever the strategy.

    model/<name>                       parameters, and rank 0's persistent buffers
    optimizer/<parameter>/<name>       the optimizer's state of a parameter
    optimizer_number/…                 the same, where it is a Python number and not a tensor
    also/<kind>/<name>                 further tensors of the run (averages of the weights); as for the model, rank 0's
                                       where ranks may differ
    rank/<r>/random/<generator>        of one rank alone
    rank/<r>/buffers/<name>            where a strategy lets each rank have buffers of its own
    rank/<r>/strategy/<name>           what the strategy remembers on a rank (PowerSGD's error feedback)

Names are those of the user's own module, so ddp, fsdp and a single process read each other's. Sharded tensors are
DTensors, of which `torch.distributed.checkpoint` saves and loads each rank's part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distaccum.checkpoints.random_state import random_state
from distaccum.errors import UserError
from distaccum.optim import probe_state
from distaccum.strategies import Strategy

_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


def state_tensors(
    strategy: Strategy, optimizer: torch.optim.Optimizer, rank: int, also: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """All tensors that this rank has a part in saving. They are the live ones, not copies.

    Args:
        also: further ones of the run, by kind and name.

    Raises:
        UserError: the optimizer keeps something that is neither a tensor nor a number.
    """
    strategy.at_rest()
    tensors = {f"model/{name}": parameter.detach() for name, parameter in strategy.module.named_parameters()}
    if rank == 0:
        tensors |= {f"model/{name}": buffer for name, buffer in persistent_buffers(strategy.module)}
    elif not strategy.shares_buffers:
        tensors |= {f"rank/{rank}/buffers/{name}": buffer for name, buffer in persistent_buffers(strategy.module)}
    for name, values in _optimizer_state(strategy.module, optimizer):
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            elif type(value) in _NUMBERS:
                tensors[f"optimizer_number/{name}/{key}"] = torch.tensor(value, dtype=_NUMBERS[type(value)])
            elif value is not None:
                raise UserError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as the {key} of {name}, and a "
                    "checkpoint holds tensors and numbers only. Set checkpoint.enabled=false, or take another one."
                )
    parameters = dict(strategy.module.named_parameters())
    for kind, tensors_of_kind in also.items():
        # What is neither sharded nor a parameter's may differ between ranks, as BatchNorm's statistics do: rank 0's
        # count, as they do of the model.
        own = {n: v for n, v in tensors_of_kind.items() if rank == 0 or n in parameters or isinstance(v, DTensor)}
        tensors |= named_also({kind: own})
    tensors |= {f"rank/{rank}/random/{name}": value for name, value in random_state(strategy.device).items()}
    return tensors | {f"rank/{rank}/strategy/{name}": value for name, value in strategy.state_tensors().items()}


def named_also(also: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Further tensors of a run, by their names in a checkpoint."""
    return {f"also/{kind}/{name}": value for kind, values in also.items() for name, value in values.items()}


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are a part of the module's `state_dict()`, each once."""
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}".lstrip("."), buffer


def own_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds this rank's state: under ZeRO-1 the one of its shard."""
    # By name, as importing the class takes long and warns of things that are not ours.
    inner = optimizer.optim if type(optimizer).__name__ == "ZeroRedundancyOptimizer" else optimizer  # type: ignore[attr-defined]
    assert isinstance(inner, torch.optim.Optimizer)
    return inner


def _optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    for parameter, values in own_optimizer(optimizer).state.items():
        if parameter in names:
            yield names[parameter], values


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the parameter groups say besides their parameters, as JSON has it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.item()
        return list(value) if isinstance(value, tuple) else value

    return [
        {
            key: plain(value)
            for key, value in group.items()
            if key != "params" and isinstance(plain(value), bool | int | float | str | list | None)
        }
        for group in own_optimizer(optimizer).param_groups
    ]


def adopt_group_settings(
    optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]], saved_at_start: list[dict[str, Any]]
) -> None:
    """Puts settings back that the optimizer had itself changed in the saved run.

    What differs from the saved run's settings at its start has been configured anew since, and is left alone.
    """
    now = group_settings(optimizer)
    if len(now) != len(saved):
        return
    # ZeRO-1 copies the settings of the outer optimizer into that of its shard at each step.
    for groups in (own_optimizer(optimizer).param_groups, optimizer.param_groups):
        for group, current, start, end in zip(groups, now, saved_at_start, saved, strict=True):
            for key, value in end.items():
                if key in current and current[key] == start.get(key) and current[key] != value:
                    if isinstance(group[key], Tensor):
                        group[key].fill_(value)
                    else:
                        group[key] = tuple(value) if isinstance(group[key], tuple) else value


def check_same_model(
    module: nn.Module,
    shapes: Mapping[str, list[int]],
    source: str = "the checkpoint",
    otherwise: str = "begin anew with resume=none and another run_dir",
) -> None:
    """Refuses a checkpoint of another model.

    Args:
        shapes: of all tensors in the checkpoint, by name.
        source, otherwise: what holds them, and what else can be done, for the message.

    Raises:
        UserError: names what is missing, unexpected or of another shape.
    """
    members = [*module.named_parameters(), *persistent_buffers(module)]
    here = {f"model/{name}": list(value.shape) for name, value in members}
    there = {name: shape for name, shape in shapes.items() if name.startswith("model/")}
    problems = [f"{name.removeprefix('model/')} is missing from it" for name in here.keys() - there.keys()]
    problems += [f"{name.removeprefix('model/')} is unknown to the model" for name in there.keys() - here.keys()]
    problems += [
        f"{name.removeprefix('model/')} is {there[name]} there and {here[name]} here"
        for name in here.keys() & there.keys()
        if here[name] != there[name]
    ]
    if problems:
        more = f"; and {len(problems) - 3} more differences" if len(problems) > 3 else ""
        raise UserError(
            f"{source} holds another model: {'; '.join(sorted(problems)[:3])}{more}. Configure the model that it "
            f"was made of, or {otherwise}."
        )


def optimizer_targets(
    module: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, tuple[list[int], torch.dtype]]
) -> dict[str, Tensor]:
    """Empty tensors for the optimizer's state in a checkpoint, as far as it is of parameters on this rank.

    Args:
        stored: shape and format of all tensors in the checkpoint, by name.
    """
    names = dict(module.named_parameters())
    mine = {id(parameter) for group in own_optimizer(optimizer).param_groups for parameter in group["params"]}
    targets: dict[str, Tensor] = {}
    for path, (shape, dtype) in stored.items():
        if not path.startswith(("optimizer/", "optimizer_number/")):
            continue
        parameter = names.get(_parameter_and_key(path)[0])
        if parameter is None or id(parameter) not in mine:
            continue
        if isinstance(parameter, DTensor) and list(parameter.shape) == shape:
            targets[path] = torch.zeros_like(parameter.detach(), dtype=dtype)
        else:
            targets[path] = torch.zeros(shape, dtype=dtype)
    return targets


def _parameter_and_key(path: str) -> tuple[str, str]:
    name, _, key = path.split("/", 1)[1].rpartition("/")
    return name, key


def check_same_state(module: nn.Module, optimizer: torch.optim.Optimizer, stored: Iterable[str]) -> None:
    """Refuses the state of an optimizer of torch's that has other settings by now, and would miss something in it.

    Args:
        stored: names of all tensors in the checkpoint.

    Raises:
        UserError: names what is missing.
    """
    optimizer = own_optimizer(optimizer)
    kept: dict[str, set[str]] = {}
    for path in stored:
        if path.startswith(("optimizer/", "optimizer_number/")):
            name, key = _parameter_and_key(path)
            kept.setdefault(name, set()).add(key)
    _check_same_bits(module, optimizer, kept)
    if not type(optimizer).__module__.startswith("torch.optim."):
        return
    needed: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters():
        if name not in kept:
            continue
        if parameter.ndim not in needed:
            found = probe_state(optimizer, (2,) * parameter.ndim) or {}
            needed[parameter.ndim] = {key for key, value in found.items() if value is not None}
        if missing := sorted(needed[parameter.ndim] - kept[name]):
            raise UserError(
                f"the checkpoint has no {missing[0]} of {name}, which {type(optimizer).__name__} needs with its "
                "settings now. Configure the optimizer as it was, or begin anew with resume=none and another run_dir."
            )


def _check_same_bits(module: nn.Module, optimizer: Any, kept: Mapping[str, set[str]]) -> None:
    """The same of bitsandbytes' optimizers, which leave moments as they find them, in 8 bits or in 32."""
    if not all(hasattr(getattr(optimizer, "args", None), key) for key in ("optim_bits", "min_8bit_size")):
        return
    common = {key: getattr(optimizer.args, key) for key in ("optim_bits", "min_8bit_size")}
    own = dict(optimizer.mng.pid2config)
    for layer, attribute, config in optimizer.mng.module_weight_config_triple:
        own[id(getattr(layer, attribute))] = config  # which bitsandbytes looks at in the first step
    for name, parameter in module.named_parameters():
        config = {**common, **own.get(id(parameter), {})}
        least = config["min_8bit_size"]
        was_8bit = "absmax1" in kept.get(name, ())
        is_8bit = config["optim_bits"] == 8 and parameter.numel() >= least
        if name in kept and was_8bit != is_8bit:
            raise UserError(
                f"the checkpoint has the moments of {name} in {8 if was_8bit else 32} bits, and with "
                f"optim_bits={config['optim_bits']} and min_8bit_size={least} they would be in "
                f"{8 if is_8bit else 32}. Configure the optimizer as it was, or begin anew with resume=none and "
                "another run_dir."
            )


def set_optimizer_state(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    formats: Mapping[str, torch.dtype],
) -> None:
    """Gives an optimizer its state back, on the devices where it keeps it, in exactly the formats it was saved in.

    What was of its parameter's format, and that is another one now, follows the parameter.

    Args:
        tensors: as `optimizer_targets` names them.
        formats: that parameters were saved in, by name.
    """
    optimizer = own_optimizer(optimizer)
    names = dict(module.named_parameters())
    names_of = {parameter: name for name, parameter in names.items()}
    state: dict[nn.Parameter, dict[str, Any]] = {}
    for path, tensor in tensors.items():
        name, key = _parameter_and_key(path)
        state.setdefault(names[name], {})[key] = tensor.item() if path.startswith("optimizer_number/") else tensor
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    packed = optimizer.state_dict()
    # A copy, as load_state_dict may take what it is given for its own.
    packed["state"] = {number: dict(state[p]) for number, p in enumerate(parameters) if p in state}
    optimizer.load_state_dict(packed)
    for parameter, values in state.items():
        for key, value in values.items():
            placed = optimizer.state[parameter][key]
            if not isinstance(placed, Tensor) or placed.dtype == value.dtype:
                continue
            follows = formats.get(names_of[parameter]) == value.dtype != parameter.dtype and key != "step"
            if not follows:
                # load_state_dict casts to the parameter's format, which would round.
                optimizer.state[parameter][key] = value.to(placed.device)


def extra_states(module: nn.Module) -> dict[str, Any]:
    """What modules give from `get_extra_state`, by their names.

    Raises:
        UserError: it can't be written as JSON.
    """
    found = {}
    for name, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            found[name] = part.get_extra_state()
            try:
                json.dumps(found[name])
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"the extra state of {name or 'the model'} can't be put into a checkpoint, which holds tensors and "
                    f"JSON only: {error}. Make it a buffer, or set checkpoint.enabled=false."
                ) from error
    return found


def set_extra_states(module: nn.Module, states: Mapping[str, Any]) -> None:
    """Puts back what `extra_states` gave."""
    for name, part in module.named_modules():
        if name in states:
            part.set_extra_state(states[name])

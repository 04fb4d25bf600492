"""The state of an optimizer in a checkpoint: tensors by name, and the settings of its groups."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distaccum.checkpoints.encoding import decoded, encoded
from distaccum.checkpoints.folder import Checkpoint
from distaccum.errors import UserError
from distaccum.strategies.optimizers import own_optimizer, probe_state, twin_of

_OF_OPTIMIZER = ("optimizer/", "optimizer_json/")
_STATE, _DICT = ".state", ".dict"
"""No parameter's name begins with a dot."""


def _names(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The model's parameters by their names, and those that the optimizer has besides (of a loss, for instance)."""
    names: dict[str, Tensor] = dict(module.named_parameters())
    known = {id(parameter) for parameter in names.values()}
    every = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return names | {f".outside.{number}": entry for number, entry in enumerate(every) if id(entry) not in known}


def outside_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The parameters that the optimizer has besides the model's, by their names in a checkpoint."""
    return {f"outside/{name}": entry for name, entry in _names(module, optimizer).items() if name.startswith(".")}


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of this rank's optimizer, by its names in a checkpoint.

    Raises:
        UserError: it is of a kind that a checkpoint can't hold.
    """
    names = {id(parameter): name for name, parameter in _names(module, optimizer).items()}
    return _tensors_of(own_optimizer(optimizer), names)


def _tensors_of(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    state: dict[str, Any] = {_STATE: {}, _DICT: {}}
    for owner, values in optimizer.state.items():
        if id(owner) in names:
            state[names[id(owner)]] = values if isinstance(values, dict) else {0: values}
        else:
            state[_STATE][owner] = values
    if _has_own_state_dict(optimizer):
        whole = optimizer.state_dict()
        state[_DICT] = {key: value for key, value in whole.items() if key not in ("state", "param_groups")}
    tensors: dict[str, Tensor] = {}
    for name, values in state.items():
        for key, value in values.items():
            if isinstance(value, DTensor) or type(value) in (Tensor, nn.Parameter):
                tensors[f"optimizer/{name}/{key}"] = value.detach()
                continue
            kept: list[Tensor] = []
            try:
                if not isinstance(key, str) or not {"/", "@"}.isdisjoint(key):
                    raise TypeError(f"a {type(key).__name__}, which is no name,")
                text = json.dumps(encoded(value, kept))
            except TypeError as error:
                raise UserError(
                    f"{type(optimizer).__name__} keeps {error} as the {key} of {name}, and a checkpoint holds tensors, "
                    "numbers, texts, and lists and dictionaries of them. Set checkpoint.enabled=false, or take another."
                ) from error
            tensors[f"optimizer_json/{name}/{key}"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
            tensors |= {f"optimizer/{name}/{key}@{number}": part for number, part in enumerate(kept)}
    return tensors


def _has_own_state_dict(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).state_dict is not torch.optim.Optimizer.state_dict


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer whose state can't all be saved, before it has any: another one of its kind is tried.

    Raises:
        UserError: it keeps state in an attribute, or something that a checkpoint can't hold.
    """
    own = own_optimizer(optimizer)
    if type(own).__module__.startswith(("torch.optim.", "bitsandbytes.")):
        return
    twin = twin_of(own)
    if twin is not None:
        _tensors_of(twin, {id(parameter): "a parameter" for parameter in twin.param_groups[0]["params"]})
    if _has_own_state_dict(own):
        return
    lost = [
        name
        for name, value in vars(own).items()
        for part in (value if isinstance(value, list | tuple) else (value,))
        if isinstance(part, torch.optim.Optimizer) and part.state is not own.state
    ]
    if twin is not None:
        before = _attributes(twin)
        with suppress(Exception):  # it is only to show what changes
            twin.step()
        lost += [name for name, text in _attributes(twin).items() if before.get(name, text) != text]
    if lost:
        raise UserError(
            f"{type(own).__name__} keeps what changes from step to step in its attribute {lost[0]}, which its "
            "state_dict() doesn't hold: a run that goes on would lose it. Keep it in its `state` or in its groups, let "
            "its state_dict() and load_state_dict() have it, or set checkpoint.enabled=false."
        )


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    found = {}
    for name in vars(optimizer).keys() - {"state", "param_groups"}:
        with suppress(TypeError):
            found[name] = json.dumps(encoded(getattr(optimizer, name)))
    return found


def group_settings(optimizer: torch.optim.Optimizer, constant: dict[tuple[int, str], Any]) -> list[dict[str, Any]]:
    """The settings of the parameter groups, as JSON values.

    Args:
        constant: gets, at the first call, values that JSON doesn't have; these are not saved.

    Raises:
        UserError: such a value has changed since.
    """
    found: list[dict[str, Any]] = []
    for number, group in enumerate(own_optimizer(optimizer).param_groups):
        found.append({})
        for key, value in group.items():
            if key == "params":
                continue
            try:
                found[-1][key] = encoded(value)
            except TypeError as error:
                if constant.setdefault((number, key), value) is not value:
                    raise UserError(
                        f"{type(optimizer).__name__} changes {key} in its parameter groups, and a checkpoint can't "
                        f"hold {error} there. Keep it in the optimizer's `state`, or set checkpoint.enabled=false."
                    ) from error
    return found


def adopt_group_settings(
    optimizer: torch.optim.Optimizer, at_start: list[dict[str, Any]], saved: Mapping[str, Any]
) -> None:
    """Restores settings, except those that this run has been started with other values of than the saved run.

    Groups that all have names are those of the same name; others are those of the same number.

    Args:
        at_start: settings at the start of this run.
        saved: `settings` and `settings_at_start` of the saved run.
    """
    before, ends = saved["settings_at_start"], saved["settings"]
    if (names := _names_of_groups(at_start)) and (names_before := _names_of_groups(ends)):
        orders = [dict(zip(names_before, groups, strict=True)) for groups in (before, ends)]
        # A group that is new has nothing to restore.
        before, ends = ([order.get(name, {}) for name in names] for order in orders)

    def text(groups: list[dict[str, Any]], number: int, key: str) -> str | None:
        # Lists and tuples are the same here.
        found = decoded(groups[number].get(key, _STATE))
        return json.dumps(found, default=lambda tensor: tensor.tolist())

    # ZeRO-1 copies the settings of the outer optimizer into that of its shard at each step.
    for groups in (own_optimizer(optimizer).param_groups, optimizer.param_groups):
        for number, (group, end) in enumerate(zip(groups, ends, strict=True)):
            is_new = number >= min(len(at_start), len(before))
            for key, value in end.items():
                if not is_new and text(at_start, number, key) != text(before, number, key):
                    continue  # configured anew since
                was, value = group.get(key), decoded(value)
                if isinstance(was, Tensor):
                    was.copy_(torch.as_tensor(value))
                else:
                    group[key] = tuple(value) if isinstance(was, tuple) else value


def _names_of_groups(groups: list[dict[str, Any]]) -> list[str]:
    """Returns the names of groups, of which a single one is the default; empty if they don't all have names."""
    names = [group.get("name", "default" if len(groups) == 1 else None) for group in groups]
    found = [name for name in names if isinstance(name, str)]
    return found if len(set(found)) == len(groups) else []


def optimizer_targets(
    module: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, tuple[list[int], torch.dtype]]
) -> dict[str, Tensor]:
    """Returns tensors to read the optimizer's state in a checkpoint into, as far as it is of parameters on this rank.

    Those of a parameter's shape also have its order in memory, which fused kernels rely on.

    Args:
        stored: shape and format of all tensors in the checkpoint, by name.
    """
    names = _names(module, optimizer)
    mine = {id(parameter) for group in own_optimizer(optimizer).param_groups for parameter in group["params"]}
    targets: dict[str, Tensor] = {}
    for path, (shape, dtype) in stored.items():
        if not path.startswith(_OF_OPTIMIZER):
            continue
        name, _ = _parameter_and_key(path)
        parameter = names.get(name)
        if name not in (_STATE, _DICT) and (parameter is None or id(parameter) not in mine):
            continue
        if parameter is not None and list(parameter.shape) == shape and path.startswith("optimizer/"):
            device = None if isinstance(parameter, DTensor) else torch.device("cpu")
            targets[path] = torch.zeros_like(parameter.detach(), dtype=dtype, device=device)
        else:
            targets[path] = torch.zeros(shape, dtype=dtype)
    return targets


def _parameter_and_key(path: str) -> tuple[str, str]:
    name, _, key = path.split("/", 1)[1].rpartition("/")
    return name, key


def check_same_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint of another optimizer, or of one with other groups or parameters.

    Raises:
        UserError: names what differs.
    """
    own, saved, stored = own_optimizer(optimizer), checkpoint.state["optimizer"], checkpoint.manifest["tensors"]
    if saved["name"] != (name := type(own).__name__):
        raise UserError(
            f"the checkpoint {checkpoint.path} holds the state of {saved['name']}, and the optimizer is "
            f"{name}. Configure the same, or begin anew with resume=none and another run_dir."
        )
    have_names = _names_of_groups(own.param_groups) and _names_of_groups(saved["settings"])
    if (before := len(saved["settings"])) != (now := len(own.param_groups)) and not have_names:
        raise UserError(
            f"the checkpoint {checkpoint.path} holds {before} parameter groups of the optimizer, which has {now}. "
            "Give it as many; those that add_param_group adds on the way must be there before restoring."
        )
    outside = outside_parameters(module, optimizer).keys()
    if different := outside ^ {name for name in stored if name.startswith("outside/")}:
        raise UserError(
            f"the checkpoint {checkpoint.path} and the optimizer don't have the same parameters besides the "
            f"model's: number {min(different).rpartition('.')[2]} of the optimizer's is in one of them alone. Give "
            "the optimizer the same parameters in the same order, or begin anew in another folder."
        )
    check_same_state(module, optimizer, stored)


def check_same_state(module: nn.Module, optimizer: torch.optim.Optimizer, stored: Iterable[str]) -> None:
    """Refuses a checkpoint that lacks state which an optimizer of torch's needs with its settings now.

    Args:
        stored: names of all tensors in the checkpoint.

    Raises:
        UserError: names what is missing.
    """
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    optimizer = own_optimizer(optimizer)
    kept: dict[str, set[str]] = {}
    for path in stored:
        if path.startswith(_OF_OPTIMIZER):
            name, key = _parameter_and_key(path)
            kept.setdefault(name, set()).add(key)
    _check_same_bits(module, optimizer, kept)
    if not type(optimizer).__module__.startswith("torch.optim."):
        return
    needed: dict[tuple[int, int], set[str]] = {}
    for name, parameter in module.named_parameters():
        if name not in kept:
            continue
        group = group_of.get(id(parameter), optimizer.param_groups[0])
        if (kind := (parameter.ndim, id(group))) not in needed:
            found = probe_state(optimizer, (2,) * parameter.ndim, group) or {}
            needed[kind] = {key for key, value in found.items() if value is not None}
        if missing := sorted(needed[kind] - kept[name]):
            raise UserError(
                f"the checkpoint has no {missing[0]} of {name}, which {type(optimizer).__name__} needs with its "
                "settings now. Configure the optimizer as it was, or begin anew with resume=none and another run_dir."
            )


def _check_same_bits(module: nn.Module, optimizer: Any, kept: Mapping[str, set[str]]) -> None:
    """The same for bitsandbytes' optimizers, which go on with moments in 8 or 32 bits as they are restored."""
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
    """Restores an optimizer's state, on the devices where it keeps it, in exactly the formats it was saved in.

    State in its parameter's format follows the parameter if that has another format now.

    Args:
        tensors: named as by `optimizer_targets`.
        formats: the formats in which parameters were saved, by name.
    """
    names, optimizer = _names(module, optimizer), own_optimizer(optimizer)
    device = next((parameter.device for parameter in names.values()), None)
    found: dict[str, dict[str, Any]] = {}
    for path, tensor in tensors.items():
        name, key = _parameter_and_key(path)
        found.setdefault(name, {})[key] = tensor
    for path in [path for path in tensors if path.startswith("optimizer_json/")]:
        name, key = _parameter_and_key(path)
        count = sum(other.startswith(f"{key}@") for other in found[name])
        kept = [found[name].pop(f"{key}@{number}") for number in range(count)]
        found[name][key] = decoded(json.loads(bytes(tensors[path].tolist())), kept, device)
    packed = optimizer.state_dict() | found.pop(_DICT, {})
    others = found.pop(_STATE, {})
    state = {names[name]: values for name, values in found.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if state or "state" in packed:
        # A copy, as load_state_dict may take what it is given for its own.
        packed["state"] = {number: dict(state[p]) for number, p in enumerate(parameters) if p in state}
    optimizer.load_state_dict(packed)
    for name, values in found.items():
        parameter = names[name]
        for key, value in values.items():
            placed = optimizer.state[parameter].get(key)
            # load_state_dict casts to the parameter's format, which would round.
            follows = (
                isinstance(value, Tensor) and formats.get(name) == value.dtype != parameter.dtype and key != "step"
            )
            if isinstance(placed, Tensor) and placed.dtype != value.dtype and not follows:
                optimizer.state[parameter][key] = value.to(placed.device)
            elif not isinstance(value, Tensor):
                optimizer.state[parameter][key] = value  # of a text it would have made another one
    optimizer.state.update(others)  # type: ignore[arg-type]  # whatever its keys are

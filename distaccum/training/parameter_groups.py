"""Parameter groups of an optimizer: by names, without weight decay where it does harm, lower rates for early layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distaccum.config import instantiate as targets
from distaccum.errors import UserError, listed
from distaccum.strategies.blocks import blocks_of
from distaccum.training.patterns import parameters_like

KEYS = ("groups", "no_weight_decay", "layer_decay")
KINDS = ("bias", "norm", "embedding")
DEFAULT = "default"
"""Name of the group of all parameters that belong to no other."""
_OF_ALL = frozenset(("foreach", "fused", "capturable", "differentiable"))
"""Options that choose a kernel, which is one and the same for all groups."""


def split(section: Any) -> tuple[dict[str, Any], Grouping]:
    """Splits a section `optim` into the optimizer's arguments, `_target_` among them, and the keys about groups.

    A key that the optimizer takes itself under the same name is the optimizer's.

    Raises:
        UserError: a key about groups has a value that it can't have.
    """
    arguments = targets.arguments_of(section, "optim")
    own: Collection[str] = ()
    if any(arguments.get(key) for key in KEYS):
        signature = targets.signature_of(targets.locate(arguments[targets.TARGET], "optim"))
        own = signature.parameters if signature is not None else ()
    found = {key: arguments.pop(key) for key in KEYS if key in arguments and key not in own}
    return arguments, Grouping(
        groups=[_Entry.of(entry, number) for number, entry in enumerate(_list(found, "groups"))],
        no_weight_decay=[_kind(entry) for entry in _list(found, "no_weight_decay")],
        layer_decay=_decay(found.get("layer_decay")),
    )


def _list(found: Mapping[str, Any], key: str) -> list[Any]:
    value = found.get(key) or []
    if not isinstance(value, list):
        raise UserError(f"optim.{key}={value!r} must be a list.")
    return value


def _kind(entry: Any) -> str:
    if entry not in KINDS:
        raise UserError(
            f"optim.no_weight_decay takes {', '.join(KINDS)}, and not {entry}. Name others in optim.groups."
        )
    return str(entry)


def _decay(value: Any) -> float | None:
    if value is not None and (not isinstance(value, int | float) or not 0 < value <= 1):
        raise UserError(
            f"optim.layer_decay={value} is impossible: it must be above 0 and at most 1, 0.75 for instance."
        )
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """An entry of `optim.groups`."""

    name: str
    patterns: list[str]
    options: dict[str, Any]

    @classmethod
    def of(cls, entry: Any, number: int) -> _Entry:
        where = f"optim.groups[{number}]"
        if not isinstance(entry, Mapping) or "match" not in entry:
            raise UserError(
                f"{where}={entry!r} must be patterns of names, and the options of their parameters, as in "
                "{match: [head.*], lr: 0.01}."
            )
        patterns = entry["match"] if isinstance(entry["match"], list) else [entry["match"]]
        name = entry.get("name", ",".join(map(str, patterns)))
        if not patterns or not all(isinstance(value, str) and value for value in (name, *patterns)):
            raise UserError(f"{where}: match must be a list of patterns, and name a text; got {entry!r}.")
        options = {str(key): value for key, value in entry.items() if key not in ("match", "name")}
        if "params" in options:
            raise UserError(f"{where}: a group's parameters are those whose names match; leave params out.")
        for key in options.keys() & {"lr", "weight_decay"}:
            if isinstance(options[key], bool) or not isinstance(options[key], int | float):
                raise UserError(f"{where}: {key}={options[key]} is impossible: it must be a number.")
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        return cls(name=name, patterns=patterns, options=options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouping:
    """Groups the parameters of a model."""

    groups: list[_Entry]
    no_weight_decay: list[str]
    layer_decay: float | None

    def __bool__(self) -> bool:
        return bool(self.groups or self.no_weight_decay or self.layer_decay is not None)

    def groups_of(self, module: nn.Module, lr: float | None) -> list[dict[str, Any]]:
        """Returns the groups of a model's trainable parameters as torch's optimizers take them, each with its `name`.

        A parameter gets the options of the first entry of `optim.groups` with a pattern of its name. Its learning rate
        is multiplied by the `layer_decay` to the power of the layers above it, and its weight decay is 0 if it is of a
        kind in `no_weight_decay`. The group of those without an entry, in the uppermost layer, comes first.

        Args:
            lr: that of parameters whose entry has none.

        Raises:
            UserError: a pattern matches no name, an entry has no parameter left, or two groups have the same name.
        """
        entries = self._entry_of_each(module)
        stages, stage_names = _stages(module) if self.layer_decay is not None else ({}, [""])
        kinds = parameter_kinds(module) if self.no_weight_decay else {}
        found: dict[tuple[int, int, bool], list[Tensor]] = {}
        for parameter in module.parameters():
            if parameter.requires_grad:
                entry, above = entries.get(id(parameter), -1), len(stage_names) - 1 - stages.get(id(parameter), 0)
                is_plain = not kinds.get(id(parameter), set()).isdisjoint(self.no_weight_decay)
                found.setdefault((entry, above, is_plain), []).append(parameter)
        groups = []
        for (number, above, is_plain), parameters in sorted(found.items(), key=lambda item: item[0]):
            options = dict(self.groups[number].options) if number >= 0 else {}
            names = [self.groups[number].name] if number >= 0 else []
            if self.layer_decay is not None:
                rate = options.get("lr", lr)
                if not isinstance(rate, int | float):
                    raise UserError("optim.layer_decay lowers optim.lr from layer to layer: give optim.lr, a number.")
                options["lr"] = rate * self.layer_decay**above
                names.append(stage_names[-1 - above])
            if is_plain:
                options["weight_decay"] = 0.0
                names.append("no_weight_decay")
            groups.append({"params": parameters, "name": "-".join(names) or DEFAULT, **options})
        names = [group["name"] for group in groups]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise UserError(f"two groups of optim.groups have the name {min(doubled)}: give each a name of its own.")
        return groups

    def _entry_of_each(self, module: nn.Module) -> dict[int, int]:
        """Returns the number of the first entry that matches, by the parameter's id."""
        entries: dict[int, int] = {}
        for number, entry in enumerate(self.groups):
            matched = {
                id(parameter)
                for pattern in entry.patterns
                for parameter in parameters_like(module, pattern, f"optim.groups[{number}]")
            }
            if matched <= entries.keys():
                raise UserError(
                    f"optim.groups[{number}]: all {len(matched)} parameters that {listed(entry.patterns)} match are "
                    "in groups before it, and the first match wins. Put it before them, or leave it out."
                )
            entries |= {key: number for key in matched if key not in entries}
        return entries

    def check_options(self, optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any] | None) -> None:
        """Refuses options that an optimizer doesn't have, or of impossible values. torch would take any.

        Args:
            optimizer: as it was built with the groups.
            arguments: what its class was called with besides; None if it isn't torch's or bitsandbytes'.

        Raises:
            UserError: names the options that there are.
        """
        name, known = type(optimizer).__name__, sorted(optimizer.defaults.keys() - _OF_ALL)
        if self.no_weight_decay and "weight_decay" not in known:
            raise UserError(f"optim.no_weight_decay: {name} has no weight decay. Its options: {listed(known, 20)}.")
        for number, entry in enumerate(self.groups):
            for option in entry.options.keys() - set(known):
                raise UserError(
                    f"optim.groups[{number}]: {name} has no option {option} for a group. It has {listed(known, 20)}."
                )
            if arguments is None or not entry.options:
                continue
            # Their constructors check the values of arguments, and not those of groups.
            try:
                targets.build({**arguments, **entry.options}, "optim", [nn.Parameter(torch.zeros(2, 2))])
            except Exception as error:  # some fail on a wrong value before they have checked it
                given = listed([f"{key}={value}" for key, value in entry.options.items()])
                raise UserError(f"optim.groups[{number}]: {name} refuses {given}: {error}.") from error


def described(optimizer: torch.optim.Optimizer) -> str:
    """Returns the groups of an optimizer with their sizes, learning rates and weight decays, in one line."""

    def of(group: Mapping[str, Any]) -> str:
        size = sum(parameter.numel() for parameter in group["params"])
        decay = f", weight_decay {group['weight_decay']:g}" if "weight_decay" in group else ""
        return f"{group['name']} ({size:,} numbers, lr {group['lr']:.3g}{decay})"

    groups = optimizer.param_groups
    return f"{len(groups)} parameter group{'s' * (len(groups) > 1)}: {listed([of(group) for group in groups], 30)}"


def parameter_kinds(module: nn.Module) -> dict[int, set[str]]:
    """Returns which of `KINDS` each parameter is of, by its id.

    `bias`: of at most one dimension, with bias as a word of its name (`bias`, `in_proj_bias`). `norm`: of a
    normalization layer of torch's, or of at most one dimension in a module whose class name has Norm in it
    (`LlamaRMSNorm`). `embedding`: of `nn.Embedding` or `nn.EmbeddingBag`. A tied parameter is of the kinds of all its
    owners.
    """
    kinds: dict[int, set[str]] = {}
    for owner in module.modules():
        is_norm = isinstance(owner, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | _NormBase)
        for name, parameter in owner.named_parameters(recurse=False):
            found = kinds.setdefault(id(parameter), set())
            if parameter.ndim <= 1 and "bias" in name.split("_"):
                found.add("bias")
            if is_norm or (parameter.ndim <= 1 and "Norm" in type(owner).__name__):
                found.add("norm")
            if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
                found.add("embedding")
    return kinds


def _stages(module: nn.Module) -> tuple[dict[int, int], list[str]]:
    """Returns the stage of each parameter by its id, from 0 at the input, and the names of the stages.

    Stages are the blocks in order, `embedding` below and `head` above them where there are parameters. Of parameters
    outside of blocks, those of embeddings and those registered before the first block are below.
    """
    blocks = _blocks_in_order(module)
    block_of: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for parameter in block.parameters():
            block_of.setdefault(id(parameter), number)
    kinds = parameter_kinds(module)
    below: set[int] = set()
    above: set[int] = set()
    has_begun = False
    for parameter in module.parameters():
        has_begun |= id(parameter) in block_of
        if id(parameter) not in block_of:
            (above if has_begun and "embedding" not in kinds[id(parameter)] else below).add(id(parameter))
    used = sorted(set(block_of.values()))
    names = ["embedding"] * bool(below) + [f"block{number}" for number in range(len(used))] + ["head"] * bool(above)
    if len(names) < 2:
        raise UserError(
            f"optim.layer_decay needs a model of several blocks, and {type(module).__name__} is one. Blocks are the "
            "members of each ModuleList, or of Sequentials whose members are of one class, or else the model's "
            "children. Leave it out, or name layers in optim.groups."
        )
    places = {number: place for place, number in enumerate(used, start=bool(below))}
    stages = {key: places[number] for key, number in block_of.items()}
    return stages | dict.fromkeys(below, 0) | dict.fromkeys(above, len(names) - 1), names


def _blocks_in_order(module: nn.Module) -> list[nn.Module]:
    if any(isinstance(part, nn.ModuleList) and any(True for _ in part.parameters()) for part in module.modules()):
        return blocks_of(module)
    rows = [
        [member for member in part if any(True for _ in member.parameters())]
        for part in module.modules()
        if isinstance(part, nn.Sequential)
    ]
    alike = [row for row in rows if len(row) > 1 and len({type(member) for member in row}) == 1]
    return [member for row in alike for member in row] or blocks_of(module)

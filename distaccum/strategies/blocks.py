"""The blocks of a model: units of FSDP's sharding and of activation checkpointing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from distaccum.errors import UserError


def blocks_of(module: nn.Module, names: Sequence[str] = ()) -> list[nn.Module]:
    """The modules of the named classes; without names the members of each `ModuleList`, or else the module's children.

    Blocks without parameters are left out.

    Raises:
        UserError: no module has one of the names.
    """
    if names:
        blocks = [child for child in module.modules() if type(child).__name__ in names and child is not module]
        if missing := set(names) - {type(block).__name__ for block in blocks}:
            there = ", ".join(sorted({type(child).__name__ for child in module.modules()}))
            raise UserError(f"strategy.wrap={sorted(missing)}: the model has no such module. It has: {there}.")
        return blocks
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    blocks = [block for child in lists for block in child] if lists else list(module.children())
    return [block for block in blocks if any(True for _ in block.parameters())]


def blocks_to_wrap(module: nn.Module, names: Sequence[str] = ()) -> list[nn.Module]:
    """The blocks that are gathered and sharded as one each; the rest goes with the root.

    Raises:
        UserError: no module has one of the names.
    """
    blocks = blocks_of(module, names)
    if names:
        return blocks
    owned = [id(parameter) for block in blocks for parameter in block.parameters()]
    inside = set(owned)
    uses = [p for _, p in module.named_parameters(remove_duplicate=False) if id(p) in inside]
    # A parameter that belongs to two blocks, or to a block and the rest, must be gathered with both: by the root.
    return blocks if len(owned) == len(uses) == len(inside) else []

"""Muon for the hidden matrices of a model, AdamW for its other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from distaccum.errors import UserError
from distaccum.training.buckets import evaluated
from distaccum.training.patterns import parameters_like

MUON, ADAMW = "muon", "adamw"


class Muon(torch.optim.Optimizer):
    """torch's Muon for groups with `part="muon"`, and its AdamW for those with `part="adamw"`.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes the momentum of a matrix nearly orthogonal, by a
    Newton–Schulz iteration that torch runs in bfloat16. It is meant for matrices in the middle of a network;
    embeddings, heads and vectors are for AdamW. With `adjust_lr_fn="match_rms_adamw"` a step is multiplied by
    0.2 √max(rows, columns), so that it is as large as AdamW's and both take one learning rate (Liu et al. 2025, "Muon
    is Scalable for LLM Training").

    Args:
        params: parameters, or groups with any of the options, `part` among them.
        lr, weight_decay: of both parts.
        momentum, nesterov, ns_steps, adjust_lr_fn: of Muon, as torch's.
        betas, eps: of AdamW.
        part: of groups that don't say theirs.
        kernel: arguments that choose AdamW's implementation, as `{"fused": True}`.

    Raises:
        ValueError: torch refuses an option, or Muon is given a parameter that is no matrix.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        part: str = MUON,
        kernel: dict[str, bool] | None = None,
    ) -> None:
        common = {"lr": lr, "weight_decay": weight_decay}
        muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        adamw = {"betas": betas, "eps": eps}
        none: list[Any] = [{"params": []}]
        self._parts: dict[str, Any] = {
            MUON: torch.optim.Muon(none, **common, **muon),  # type: ignore[arg-type]
            ADAMW: torch.optim.AdamW(none, **common, **adamw, **(kernel or {})),  # type: ignore[arg-type]
        }
        super().__init__(params, {**common, **muon, **adamw, "part": part})
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with the options of its part that it doesn't name itself."""
        part = param_group.get("part", self.defaults["part"])
        if part not in self._parts:
            raise ValueError(f"part={part!r} must be {MUON} or {ADAMW}")
        for key, value in self._parts[part].defaults.items():
            param_group.setdefault(key, value)
        super().add_param_group(param_group)
        if part == MUON:
            for parameter in self.param_groups[-1]["params"]:
                if parameter.ndim != 2 and parameter.numel():
                    raise ValueError(f"Muon takes matrices alone, and one parameter has shape {list(parameter.shape)}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Lets both parts have their groups here, and one state."""
        for name, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["part"] == name]
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes a step of both parts; returns what the closure returns, if there is one."""
        loss = evaluated(closure)
        self._share()  # groups may have been added, and restored
        for part in self._parts.values():
            part.step()
        return loss


def in_parts(
    groups: Sequence[dict[str, Any]], module: nn.Module, adamw_match: Iterable[str], ratio: float
) -> list[dict[str, Any]]:
    """Divides groups into Muon's and AdamW's: those of hidden matrices, and all others.

    Args:
        groups: with a learning rate each, and perhaps a `name` and other options.
        module: whose parameters they are.
        adamw_match: patterns of the names of further parameters for AdamW.
        ratio: multiplies the learning rate of AdamW's groups.

    Raises:
        UserError: a pattern matches nothing, or no parameter is left for Muon.
    """
    hidden = hidden_matrices(module)
    for pattern in adamw_match:
        hidden -= {id(parameter) for parameter in parameters_like(module, pattern, "optim.adamw_match")}
    found: list[dict[str, Any]] = []
    for group in groups:
        for part in (MUON, ADAMW):
            own = [entry for entry in group["params"] if (id(entry) in hidden) == (part == MUON)]
            if own:
                name = part if group.get("name") is None else f"{group['name']}-{part}"
                rate = group["lr"] * (ratio if part == ADAMW else 1.0)
                found.append({**group, "params": own, "part": part, "name": name, "lr": rate})
    if not any(group["part"] == MUON for group in found):
        raise UserError(
            "optim=muon: the model has no hidden matrix, the weight of a linear layer that is neither its head nor an "
            "embedding, so all would be AdamW's. Set optim=adamw."
        )
    return found


def hidden_matrices(module: nn.Module) -> set[int]:
    """Returns the ids of the matrices that Muon is meant for.

    These are the weights of `nn.Linear` and the matrices of `nn.MultiheadAttention`, except those that an embedding has
    too, and the head's: the last linear layer, unless it is within a block of an `nn.ModuleList`, as where the head is
    an embedding's weight. Kernels of convolutions and other parameters of a module's own are not among them.
    """
    found: dict[int, Tensor] = {}
    others: set[int] = set()
    last = None
    inside = {
        id(part)
        for row in module.modules()
        if isinstance(row, nn.ModuleList)
        for block in row
        for part in block.modules()
        if part is not block
    }
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        if isinstance(part, nn.Linear):
            found[id(part.weight)] = part.weight
            last = part
        elif isinstance(part, nn.MultiheadAttention):
            found |= {id(entry): entry for name, entry in own.items() if name.endswith("proj_weight")}
        elif isinstance(part, nn.Embedding | nn.EmbeddingBag):
            others |= {id(entry) for entry in own.values()}
    if last is not None and id(last) not in inside:
        others.add(id(last.weight))
    return {key for key, entry in found.items() if entry.ndim == 2 and entry.requires_grad} - others

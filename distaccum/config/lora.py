"""The section `model.lora`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distaccum.errors import require, require_at_least


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (LoRA; Hu et al. 2022) by peft: the model is frozen, and the adapters alone are trained,
    sent and saved."""

    rank: int = 0
    """Rank r of the adapters. 0: none, the model itself is trained."""
    alpha: float | None = None
    """An adapter's output is multiplied by `alpha` / `rank`. `null`: twice the rank."""
    dropout: float = 0.0
    """Dropout on an adapter's input."""
    targets: Any = "all-linear"
    """Layers that get an adapter: `all-linear`, which leaves out the output layer; a list of names, as in
    `[q_proj,v_proj]`; or a regular expression for whole names."""
    merge: bool = False
    """At the end, save the whole model with the adapters added to its weights, in place of the adapters."""

    def __post_init__(self) -> None:
        require_at_least(0, model__lora__rank=self.rank)
        require(0 <= self.dropout < 1, f"model.lora.dropout={self.dropout} must be at least 0 and below 1.")
        is_list = isinstance(self.targets, list | tuple) and self.targets
        require(
            all(isinstance(name, str) for name in self.targets) if is_list else isinstance(self.targets, str),
            f"model.lora.targets={self.targets!r} must be all-linear, a list of names of layers, or a regular "
            "expression.",
        )

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


def require_four_bit(
    lora: LoraConfig | None, *, from_config: bool = False, init_on_meta: bool = False, init_from: str | None = None
) -> None:
    """Refuses what needs whole weights, with `model.load_in_4bit`."""
    require(
        not from_config,
        "model.load_in_4bit=true keeps pretrained weights in 4 bits, and model.from_config=true has none. Leave one of "
        "them out.",
    )
    require(
        not init_on_meta,
        "model.load_in_4bit=true does not support model.init_on_meta=true: it quantises pretrained weights as it reads "
        "them, and never holds the whole model. Set model.init_on_meta=false.",
    )
    require(
        not init_from,
        "model.load_in_4bit=true does not support model.init_from, whose weights are whole. Give them by "
        "model.name_or_path.",
    )
    require(
        lora is not None and lora.rank > 0,
        "model.load_in_4bit=true freezes the model, as weights of 4 bits can't be trained, and needs adapters that "
        "are: set model.lora.rank, as in model.lora.rank=16.",
    )
    require(
        lora is None or not lora.merge,
        "model.lora.merge=true does not support model.load_in_4bit=true: 4-bit weights and adapters add up to more "
        "than 4 bits. Set model.lora.merge=false, and add the adapters that are saved to the whole weights by peft "
        "(PeftModel.merge_and_unload).",
    )

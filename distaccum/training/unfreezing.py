"""Keeps parameters frozen from the start of a run until an update, as `model.unfreeze` says."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from distaccum.errors import listed, require
from distaccum.strategies import Strategy
from distaccum.strategies.optimizers import accept_changed_parameters
from distaccum.training.patterns import parameters_like

logger = logging.getLogger(__name__)


def unfreeze_updates(value: Any) -> dict[int, list[str]]:
    """Returns a value of `model.unfreeze` as patterns by update, in the order of updates.

    Raises:
        UserError: it is of another form, or has an update below 1.
    """
    example = 'it must be lists of patterns by update, as in {100: ["encoder.layers.3.*"], 200: ["encoder.*"]}.'
    require(isinstance(value, Mapping), f"model.unfreeze={value!r}: {example}")
    found = {}
    for key, patterns in value.items():
        # A manifest's JSON has made text of the numbers.
        is_number = not isinstance(key, bool) and str(key).lstrip("-").isdecimal()
        are_patterns = isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns or [None])
        require(is_number and are_patterns, f"model.unfreeze has {key!r}: {patterns!r}; {example}")
        require(int(key) >= 1, f"model.unfreeze has update {key}, and a run's first update is 1.")
        found[int(key)] = patterns
    return dict(sorted(found.items()))


def require_within_run(updates: Mapping[int, Sequence[str]], last: int) -> None:
    """Refuses updates of `unfreeze_updates` that come after the run's last one.

    Raises:
        UserError: names the first of them.
    """
    late = next((update for update in updates if update > last), None)
    require(
        late is None,
        f"model.unfreeze has update {late}, and the run's last update is {last}: what is listed there would never be "
        "trained. Set an earlier one, train for longer, or put the patterns into model.freeze.",
    )


def make_trainable(module: nn.Module, updates: Mapping[int, Sequence[str]], frozen: Sequence[str]) -> None:
    """Makes all that `model.unfreeze` lists require gradients, as it does from its update on.

    So optimizer, averages and checkpoints hold it from the start, and all that is measured counts it.

    Args:
        updates: of `unfreeze_updates`.
        frozen: the patterns of `model.freeze`.

    Raises:
        UserError: a pattern matches nothing that can be trained, something is in `model.freeze` too, or nothing is left
            to train at first.
    """
    due = _first_updates(module, updates)
    named = list(module.named_parameters(remove_duplicate=False))
    both = [
        name for name, parameter in named if parameter in due and any(fnmatchcase(name, pattern) for pattern in frozen)
    ]
    require(
        not both,
        f"model.freeze and model.unfreeze both list {listed(both, most=3)}: the one is for good, the other until an "
        "update, from the run's start on. Leave it out of one of them.",
    )
    for parameter in due:
        parameter.requires_grad_(True)
    first = min((due.get(parameter, 1) for parameter in module.parameters() if parameter.requires_grad), default=1)
    require(
        first == 1,
        f"model.unfreeze lists all that is trained, so there is nothing to train before update {first}. Leave out "
        "what is to be trained from the start, or list it at update 1.",
    )


def _first_updates(module: nn.Module, updates: Mapping[int, Sequence[str]]) -> dict[nn.Parameter, int]:
    """Maps each parameter that is listed to the update from which on it is trained: the first that it is listed at."""
    due: dict[nn.Parameter, int] = {}
    for update, patterns in updates.items():
        for pattern in patterns:
            found = parameters_like(module, pattern, "model.unfreeze")
            # Others have no gradient, like the integers of a quantized layer.
            trainable = [parameter for parameter in found if parameter.is_floating_point() or parameter.is_complex()]
            require(
                bool(trainable),
                f"model.unfreeze: {pattern} names integers alone, as weights of 4 bits are, which can't be trained. "
                "Leave it out.",
            )
            for parameter in trainable:
                due.setdefault(parameter, update)
    return due


class Unfreezing:
    """Freezes what `model.unfreeze` lists, and unfreezes it before the update that it is listed at.

    What is trained is a function of the update's number alone, so there is no state to save. A frozen parameter has no
    gradient, and the optimizer leaves it alone, weight decay and momentum too.

    Args:
        strategy: of the placed model, whose parameters are all trainable.
        optimizer: holds those parameters.
        updates: of `unfreeze_updates`.

    Raises:
        UserError: the strategy can't follow (see `Strategy.rebuild`).
    """

    def __init__(
        self, strategy: Strategy, optimizer: torch.optim.Optimizer, updates: Mapping[int, Sequence[str]]
    ) -> None:
        self._strategy = strategy
        self._optimizer = optimizer
        strategy.at_rest()
        self._due = _first_updates(strategy.module, updates)
        self._changes = set(self._due.values()) - {1}
        self.go_to(1)

    def is_due(self, update: int) -> bool:
        """Whether something is unfrozen right before an update."""
        return update in self._changes

    def go_to(self, update: int) -> None:
        """Makes trainable what is so in an update (from 1), and nothing else. All ranks call it, between windows."""
        # Else a forward has left gathered parameters in the place of FSDP's shards.
        self._strategy.at_rest()
        changed = [parameter for parameter, due in self._due.items() if parameter.requires_grad != (due <= update)]
        if not changed:
            return
        for parameter in changed:
            parameter.requires_grad_(self._due[parameter] <= update)
        self._strategy.rebuild()
        accept_changed_parameters(self._optimizer)
        every = list(self._strategy.module.parameters())
        frozen, total = sum(p.numel() for p in every if not p.requires_grad), sum(p.numel() for p in every)
        freed = sum(parameter.numel() for parameter in changed if parameter.requires_grad)
        what = f"{freed} parameters are unfrozen before update {update}" if freed else "some wait for their update"
        share = 100 * frozen / total
        logger.info("model.unfreeze: %s; %d of %d are frozen now (%.1f %%)", what, frozen, total, share)

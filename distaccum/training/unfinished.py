"""Saves a window that was left in the middle with the run, and goes on with it.

The checkpoint is that of the last update. Beside it, each rank has what `Accumulator.take_out` returns, by which
another run of as many ranks goes on in the middle of the window, bit for bit. Any other goes on from the last update:
it begins the window again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distaccum.accumulation.unfinished import is_of
from distaccum.checkpoints import Checkpoint, putting_back, read_own
from distaccum.runtime.nested import gather_objects
from distaccum.strategies import Strategy
from distaccum.training.run_folder import changes

logger = logging.getLogger(__name__)

KIND = "window"
"""Prefix of the names of a rank's tensors in `Checkpointer.own`."""


def agreed(update: int, state: Mapping[str, Tensor], strategy: Strategy) -> list[int] | None:
    """Returns how many micro-steps of a dropped window each rank has taken out of it; None if one has nothing.

    All ranks call it.
    """
    micro_steps = gather_objects(len(state["sizes"]) if state else 0, strategy.process_group)
    if not all(micro_steps):
        logger.info("update %d: no time is left to finish its window, which is dropped", update)
        return None
    logger.info("update %d: no time is left to finish its window; %s are saved", update, _shown(micro_steps))
    return micro_steps


def _shown(micro_steps: Sequence[int]) -> str:
    if len(micro_steps) == 1:
        return f"its {micro_steps[0]} micro-steps so far"
    return f"the ranks' {', '.join(map(str, micro_steps))} micro-steps so far"


def to_go_on_with(
    checkpoint: Checkpoint,
    strategy: Strategy,
    rank: int,
    pieces: Sequence[Sequence[Sequence[int]]],
    config: dict[str, Any],
) -> dict[str, Tensor]:
    """Returns what this rank has of a window that a checkpoint's run left in the middle; empty if it is begun again.

    All ranks call it, and come to the same.

    Args:
        pieces: this rank's micro-batches of the next window as they were planned, and as they are cut by now.
        config: of the run.
    """
    progress = checkpoint.state["progress"]
    micro_steps, update = progress.get("unfinished"), checkpoint.update + 1
    if not micro_steps:
        return {}
    state: dict[str, Tensor] = {}
    reason = None
    if len(micro_steps) != strategy.world_size or checkpoint.state["world_size"] != strategy.world_size:
        reason = f"it was left by {len(micro_steps)} ranks"
    elif changed := changes(progress["config"], config):
        reason = f"the configuration has changed ({changed[0]})"
    else:
        state = read_own(checkpoint, rank, KIND)
        with putting_back(checkpoint, "the window under way"):
            is_same = all(is_of(state, entry) for entry in pieces)
        reason = None if is_same else "it is cut in another way by now"
    reasons = [entry for entry in gather_objects(reason, strategy.process_group) if entry is not None]
    if reasons:
        logger.info("update %d: its window was left in the middle, and is begun again: %s", update, reasons[0])
        return {}
    logger.info("update %d: going on in the middle of its window, after %s", update, _shown(micro_steps))
    return state

"""From a configuration to a run: every part built, each by its own module, in the order that errors are cheapest."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

from distaccum.config import (
    TrainConfig,
    as_plain,
    flat,
)
from distaccum.config.redaction import hide, redacted
from distaccum.errors import UserError
from distaccum.observers import RunEnd
from distaccum.runtime.devices import resolve_device
from distaccum.runtime.logs import logging_to
from distaccum.runtime.stop_signals import Interruption
from distaccum.runtime.world import World, joined_world
from distaccum.training.build import build_trainer
from distaccum.training.resume import find_checkpoint
from distaccum.training.run_folder import (
    begin,
    held_run_folder,
    leave_marker,
)

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> RunEnd:
    """Runs a training from its configuration, in the ranks that the launcher has started.

    Raises:
        UserError: whatever in the configuration, the data or the machine keeps the run from going on.
    """
    with joined_world() as world, ExitStack() as stack:
        device = resolve_device(config.device, world.local_rank)
        world.init_process_group(device, config.distributed.timeout_seconds)
        plain = as_plain(config)
        hide(plain)
        check_same_config(world, plain)
        with world.together():
            made = stack.enter_context(held_run_folder(config.run_dir, config.resume, plain)) if world.is_main else None
        folder = world.from_main(made)
        assert folder is not None
        with world.together(), logging_to(folder.path, world.rank):
            pass  # every rank can write its log, or all stop here
        interruption = Interruption(world)
        with logging_to(folder.path, world.rank), interruption.listening():
            world.heartbeat.log_to(folder.path / "logs" / f"rank{world.rank}.log")
            checkpoint = find_checkpoint(config, folder, world)
            trainer = build_trainer(config, world, device, folder, plain, checkpoint, interruption)
            if checkpoint is not None:
                trainer.restore(checkpoint, override=config.resume_override)
            with world.together():
                if world.is_main and folder.is_restart:
                    begin(folder, plain)
            end = trainer.fit()
            if end.interrupted is not None and world.is_main:
                leave_marker(folder.path, end.updates, end.interrupted)
            return end


def check_same_config(world: World, plain: dict[str, Any]) -> None:
    """Refuses ranks that were started with different configurations.

    Raises:
        UserError: names the keys that differ and each rank's value.
    """
    everyone = world.gather(flat(plain))
    keys = sorted(set().union(*everyone))
    # As text, because NaN is not equal to itself.
    different = [key for key in keys if len({repr(flat.get(key)) for flat in everyone}) > 1]
    if different:
        shown = "; ".join(
            f"{key} is "
            + ", ".join(
                f"{redacted(flat.get(key), key.rpartition('.')[2])!r} on rank {rank}"
                for rank, flat in enumerate(everyone)
            )
            for key in different[:5]
        )
        more = f"; and {len(different) - 5} more keys" if len(different) > 5 else ""
        raise UserError(f"the ranks were started with different configurations: {shown}{more}. Give all the same.")

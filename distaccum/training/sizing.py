"""`batch.micro_batch_size=auto`: what fits is found once, remembered, and made smaller when need be."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distaccum.accumulation.recovery import Recovery
from distaccum.accumulation.result import TaskOutput
from distaccum.checkpoints import Checkpoint, putting_back
from distaccum.config import TrainConfig
from distaccum.config.launcher import launch
from distaccum.loaders import WindowLoader
from distaccum.runtime.cache import Remembered, fingerprint
from distaccum.runtime.world import World
from distaccum.strategies import Strategy
from distaccum.training.auto_micro_batch import Fitting

logger = logging.getLogger(__name__)


def settle_sizes(
    config: TrainConfig,
    plain: dict[str, Any],
    world: World,
    loader: WindowLoader,
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    forward: Callable[[nn.Module, Any], TaskOutput],
    dataset: Any,
    checkpoint: Checkpoint | None,
) -> Recovery:
    """Gives the loader the largest micro-batch that fits on each rank: the run's own, a remembered one, or found now.

    All ranks call it.

    Args:
        plain: the configuration, as JSON has it.
        forward: of the user's own module with a micro-batch.
        dataset: of the training.
        checkpoint: what the run goes on from.

    Returns:
        What the accumulator needs to go on when memory runs out all the same.

    Raises:
        UserError: not even a single sample fits on some rank.
    """
    memory = Remembered(f"micro-batch-{_fingerprint(plain, world, strategy)}-rank{world.rank}")
    own = memory.read()
    remembered = world.gather(own if isinstance(own, int) and own > 0 else None)
    before = _sizes_before(checkpoint, world.world_size)
    if before is not None:
        # Where ranks can't go on in place, the run has ended to begin again here with something smaller.
        smaller = [
            mine if theirs is None else min(mine, theirs) for mine, theirs in zip(before, remembered, strict=True)
        ]
        sizes = smaller if strategy.equal_micro_steps else before
        how = "as before in this run"
    elif all(size is not None for size in remembered):
        sizes = [size for size in remembered if size is not None]
        how = f"as found before on this machine (remove {memory.path.parent} to search again)"
    else:
        with world.together():
            own = _found(config, loader, strategy, optimizer, forward, dataset)
            memory.write(own)
        sizes, how = world.gather(own), "found by trying" if not strategy.equal_micro_steps else "reckoned"
    loader.set_sizes(sizes)
    if before is not None and checkpoint is not None:
        # Now, as forwards come before the rest is restored.
        with putting_back(checkpoint, "loader"):
            loader.load_state_dict(checkpoint.states["loader"])
    if world.is_main:
        unit = "samples" if loader.lengths is None else "tokens"
        in_use = sizes if loader.lengths is None and not strategy.equal_micro_steps else [min(sizes)]
        shown = ", ".join(map(str, in_use)) if len(set(in_use)) > 1 else str(in_use[0])
        logger.info("batch.micro_batch_size=auto: micro-batches of at most %s %s, %s", shown, unit, how)
    return Recovery(on_smaller=memory.write)


def _found(
    config: TrainConfig,
    loader: WindowLoader,
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    forward: Callable[[nn.Module, Any], TaskOutput],
    dataset: Any,
) -> int:
    lengths = loader.lengths if loader.lengths is not None else getattr(dataset, "lengths", None)
    fitting = Fitting(
        loader,
        strategy,
        forward,
        optimizer,
        lengths=lengths,
        memory_share=config.batch.auto_memory,
        ranks_on_host=launch().local_world_size,
    )
    samples = fitting.samples()
    return samples if loader.lengths is None else samples * int(loader.lengths.max())


def _sizes_before(checkpoint: Checkpoint | None, world_size: int) -> list[int] | None:
    if checkpoint is None:
        return None
    with putting_back(checkpoint, "loader"):
        sizes = checkpoint.states.get("loader", {}).get("found_sizes")
        return list(sizes) if sizes is not None and len(sizes) == world_size else None


def _fingerprint(plain: dict[str, Any], world: World, strategy: Strategy) -> str:
    """Of all that decides how much memory a micro-batch takes, and how much there is."""
    device = strategy.device
    on_cuda = device.type == "cuda"
    hardware = torch.cuda.get_device_properties(device) if on_cuda else None
    return fingerprint(
        {
            **{key: plain[key] for key in ("model", "task", "optim", "precision", "strategy", "batch")},
            "data": [plain["data"][key] for key in ("train", "collate_fn")],
            "parameters": [[name, list(p.shape), str(p.dtype)] for name, p in strategy.module.named_parameters()],
            "device": [hardware.name, hardware.total_memory] if hardware is not None else _host_memory(),
            "ranks": [world.world_size, str(world.ranks_on_host)],
            "torch": torch.__version__,
        }
    )


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

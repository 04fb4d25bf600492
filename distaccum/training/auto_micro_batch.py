"""Finds the largest micro-batch that fits into memory: by trying where that is safe, else by calculation.

The model's own forward and backward are run, on the costliest sample as often as the micro-batch is large, and
everything that this changes is put back: gradients, buffers and random generators. What a forward changes besides
(attributes of its own that are no buffers) stays changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.accumulation.recovery import Recovery
from distaccum.accumulation.result import TaskOutput
from distaccum.checkpoints import Checkpoint, putting_back
from distaccum.errors import UserError
from distaccum.loaders import WindowLoader
from distaccum.planning import split_evenly
from distaccum.planning.lengths import longest_samples
from distaccum.runtime.buffers import KeptBuffers
from distaccum.runtime.cache import Remembered, fingerprint
from distaccum.runtime.memory import KeptForBackward, free_cached_memory, free_memory, is_out_of_memory
from distaccum.runtime.nested import gather_objects, tensors_of
from distaccum.runtime.randomness import GlobalStates
from distaccum.runtime.world import World
from distaccum.strategies import Strategy, local_parts
from distaccum.strategies.optimizers import own_optimizer, probe_state

logger = logging.getLogger(__name__)

_SAMPLES_TO_LOOK_AT = 32
"""The largest of so many stands for the costliest of all, where the dataset doesn't say how long its samples are."""
_COARSENESS = 16
"""The search ends when it is known to this part of itself."""


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """Returns the largest number up to `most` for which `fits`, to within a sixteenth; 0 if there is none.

    Doubles from 2 (a single sample is a special case to some layers: BatchNorm refuses it), then bisects.
    """
    good, size = 0, min(2, most)
    while size <= most and fits(size):
        good = size
        if size == most:
            return most
        size = min(2 * size, most)
    bad = size
    while bad - good > max(1, good // _COARSENESS):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


@dataclass(slots=True)
class Fitting:
    """Finds the largest micro-batch of one rank.

    Attributes:
        loader: of the windows, none of which is consumed.
        strategy: how the model is placed.
        forward: runs the user's own module on a micro-batch.
        optimizer: its state will need memory too.
        lengths: numbers, one for each sample, if the dataset says them.
        memory_share: part of the free memory to plan with, where sizes are calculated.
        ranks_on_host: number of ranks that share the host's memory.
    """

    loader: WindowLoader
    strategy: Strategy
    forward: Callable[[nn.Module, Any], TaskOutput]
    optimizer: torch.optim.Optimizer
    lengths: Any = None
    memory_share: float = 0.8
    ranks_on_host: int = 1

    @property
    def _on_cuda(self) -> bool:
        return self.strategy.device.type == "cuda"

    def samples(self) -> int:
        """Returns the largest micro-batch that fits, in samples; never more than a rank's share of a window.

        Ranks don't wait for each other in here, but for those of strategies whose forwards hold collectives: these take
        the same two micro-steps on all ranks.

        Raises:
            UserError: not even a single sample fits; or one can't be loaded.
        """
        plan = self.loader.plan
        share = max(split_evenly(plan.global_batch_size, plan.world_size))
        sample = self._costliest_sample()
        with self._everything_put_back():
            most = self._most(sample, share)
            if self.strategy.equal_micro_steps:
                return most
            ballast = self._ballast() if self._on_cuda else None
            size = largest_that_fits(lambda size: self._fits(sample, size), most)
            del ballast
        if size == 0:
            raise UserError(
                f"batch.micro_batch_size=auto: not even a single sample (number {sample} of the training data, the "
                "costliest that was found) fits into memory. Take a smaller model, smaller samples, a smaller number "
                "format (precision=bf16), strategy=fsdp on several devices, or a larger device."
            )
        return size

    def _costliest_sample(self) -> int:
        if self.lengths is not None and len(self.lengths) == self.loader.num_samples:
            return longest_samples(self.lengths, 1)[0]
        count = min(_SAMPLES_TO_LOOK_AT, self.loader.num_samples)
        indices = [number * self.loader.num_samples // count for number in range(count)]
        if self.loader.cuts.is_ordered:
            indices = list(range(count))  # to others it is a long way
        batches = self.loader.load(0, 0, [[index] for index in indices])
        sizes = [sum(tensor.numel() for tensor in tensors_of(batch)) for batch in batches]
        return indices[sizes.index(max(sizes))]

    def _micro_step(self, sample: int, size: int) -> None:
        (batch,) = self.loader.load(0, 0, [[sample] * size])
        self.forward(self.strategy.module, batch).joined().backward()  # type: ignore[no-untyped-call]

    def _fits(self, sample: int, size: int) -> bool:
        """Tries a size. Gradients of the tries before stay, as they do within a window."""
        try:
            self._micro_step(sample, size)
            self._wait()
            logger.debug("batch.micro_batch_size=auto: %d fit", size)
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        logger.debug("batch.micro_batch_size=auto: %d don't fit", size)
        free_cached_memory(self.strategy.device)
        return False

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize(self.strategy.device)

    def _most(self, sample: int, share: int) -> int:
        """Returns the calculated size where sizes can't just be tried, else the share.

        The host rarely says that memory has run out; if it does so here, sizes are tried there too.

        Raises:
            UserError: memory runs out where ranks wait for each other.
        """
        try:
            return share if self._on_cuda and not self.strategy.equal_micro_steps else self._reckoned(sample, share)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self.strategy.equal_micro_steps:
                # The other ranks are in the middle of a collective, so that nothing smaller can be tried.
                raise UserError(
                    "batch.micro_batch_size=auto: memory runs out with a few samples already. Give "
                    "batch.micro_batch_size=1, or take a smaller model, smaller samples, a smaller number format "
                    "(precision=bf16), or more devices."
                ) from error
        free_cached_memory(self.strategy.device)
        return share

    def _reckoned(self, sample: int, share: int) -> int:
        """Returns the size that fits by a line through the memory that two small micro-batches take."""
        small = min(2, share)
        at_small = self._measured(sample, small)
        if small == share:
            return share
        room = free_memory(self.strategy.device) * self.memory_share / (1 if self._on_cuda else self.ranks_on_host)
        large = self._second_size(at_small, small, share, room)
        if large == small:
            return small if at_small + self._bytes_to_come() <= room else 1
        slope = (self._measured(sample, large) - at_small) / (large - small)
        fixed = at_small - slope * small + self._bytes_to_come()
        size = share if slope <= 0 else int((room - fixed) / slope)
        logger.debug("batch.micro_batch_size=auto: %.0f bytes a sample, %.0f free for %d", slope, room, size)
        return max(1, min(share, size))

    def _second_size(self, at_small: int, small: int, share: int, room: float) -> int:
        """Returns the larger size to measure, which fits even if all memory of the small one is in proportion to it.

        It is the same on all ranks that take their micro-steps together.
        """
        most = room - self._bytes_to_come()
        wanted = (min(8, share), min(4, share))
        large = next((size for size in wanted if size > small and at_small / small * size <= most), small)
        return min(gather_objects(large, self.strategy.process_group)) if self.strategy.equal_micro_steps else large

    def _measured(self, sample: int, size: int) -> int:
        """Returns the bytes that a forward keeps for its backward; on CUDA, those at the highest point of both."""
        if not self._on_cuda:
            module = self.strategy.module
            with KeptForBackward([*module.parameters(), *module.buffers()]) as kept:
                self._micro_step(sample, size)
            return kept.bytes
        # Gradients, and what libraries allocate at their first call. Not with a single sample, which BatchNorm refuses.
        self._micro_step(sample, size)
        self._wait()
        torch.cuda.reset_peak_memory_stats(self.strategy.device)
        before = torch.cuda.memory_allocated(self.strategy.device)
        self._micro_step(sample, size)
        self._wait()
        return torch.cuda.max_memory_allocated(self.strategy.device) - before

    # Memory that is taken later

    def _bytes_to_come(self) -> int:
        """Returns the bytes of gradients and optimizer state that do not exist yet."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is None]
        return sum(part.nbytes for part in local_parts(parameters)) + self._state_bytes_to_come()

    def _state_bytes_to_come(self) -> int:
        inner = own_optimizer(self.optimizer)
        parameters = [p for group in inner.param_groups for p in group["params"] if p not in inner.state]
        return int(sum(part.nbytes for part in local_parts(parameters)) * _state_factor(inner)) if parameters else 0

    def _ballast(self) -> Tensor:
        """Allocates the memory that the optimizer's state will need."""
        try:
            return torch.empty(self._state_bytes_to_come(), dtype=torch.uint8, device=self.strategy.device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                "batch.micro_batch_size=auto: memory has no room for the optimizer's state, about "
                f"{self._state_bytes_to_come() / 2**30:.1f} GiB. Take an optimizer with less state, "
                "strategy.shard_optimizer=true or strategy=fsdp on several ranks, or a smaller model."
            ) from error

    @contextmanager
    def _everything_put_back(self) -> Iterator[None]:
        module, device = self.strategy.module, self.strategy.device
        buffers = KeptBuffers(module)
        gradients = [(p, p.grad if p.grad is None else p.grad.clone()) for p in module.parameters()]
        try:
            with GlobalStates.now(device):
                yield
        finally:
            self.strategy.drop_gradients()
            self.strategy.at_rest()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            buffers.put_back()
            free_cached_memory(device)


def _state_factor(optimizer: torch.optim.Optimizer) -> float:
    """Returns bytes of optimizer state per byte of parameters, as a step of another optimizer of its kind shows."""
    state = probe_state(optimizer)
    if state is None:
        return 2.0
    parts = [value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1]
    return sum(value.nbytes for value in parts) / (4 * 1024)


def settle_sizes(fitting: Fitting, plain: dict[str, Any], world: World, checkpoint: Checkpoint | None) -> Recovery:
    """Sets the largest micro-batch that fits on each rank: that of the checkpoint, a cached one, or one found now.

    All ranks call it.

    Args:
        plain: the configuration as plain dictionaries.
        checkpoint: the one that the run goes on from.

    Returns:
        What the accumulator needs to go on when memory runs out all the same.

    Raises:
        UserError: not even a single sample fits on some rank.
    """
    cuts, strategy = fitting.loader.cuts, fitting.strategy
    memory = Remembered(f"micro-batch-{_fingerprint(plain, world, strategy)}-rank{world.rank}")
    own = memory.read()
    remembered = world.gather(own if isinstance(own, int) and own > 0 else None)
    before = _sizes_before(checkpoint, world.world_size)
    if before is not None:
        # Where ranks can't go on in place, the run has ended to begin again here with something smaller.
        smaller = [min(mine, theirs or mine) for mine, theirs in zip(before, remembered, strict=True)]
        sizes = smaller if strategy.equal_micro_steps else before
        how = "as before in this run"
    elif all(size is not None for size in remembered):
        sizes = [size for size in remembered if size is not None]
        how = f"as found before on this machine (remove {memory.path.parent} to search again)"
    else:
        with world.together():
            own = fitting.samples() * (1 if cuts.lengths is None else cuts.lengths.longest)
            memory.write(own)
        sizes, how = world.gather(own), "found by trying" if not strategy.equal_micro_steps else "reckoned"
    cuts.set_sizes(sizes)
    if before is not None and checkpoint is not None:
        # Now, as forwards come before the rest is restored.
        with putting_back(checkpoint, "loader"):
            cuts.load_state_dict(checkpoint.states["loader"])
    if world.is_main:
        in_use = sizes if cuts.lengths is None and not strategy.equal_micro_steps else [min(sizes)]
        shown = ", ".join(map(str, in_use)) if len(set(in_use)) > 1 else str(in_use[0])
        logger.info("batch.micro_batch_size=auto: micro-batches of at most %s %s, %s", shown, cuts.unit, how)
    return Recovery(on_smaller=memory.write)


def _sizes_before(checkpoint: Checkpoint | None, world_size: int) -> list[int] | None:
    if checkpoint is None:
        return None
    with putting_back(checkpoint, "loader"):
        sizes = checkpoint.states.get("loader", {}).get("found_sizes")
        return list(sizes) if sizes is not None and len(sizes) == world_size else None


def _fingerprint(plain: dict[str, Any], world: World, strategy: Strategy) -> str:
    """Returns a fingerprint of all that decides how much memory a micro-batch takes, and how much there is."""
    device = strategy.device
    on_cuda = device.type == "cuda"
    hardware = torch.cuda.get_device_properties(device) if on_cuda else None
    return fingerprint(
        {
            **{key: plain[key] for key in ("model", "task", "optim", "precision", "strategy", "batch")},
            "data": [plain["data"][key] for key in ("train", "collate_fn")],
            "parameters": [[name, list(p.shape), str(p.dtype)] for name, p in strategy.module.named_parameters()],
            "device": [hardware.name, hardware.total_memory]
            if hardware is not None
            else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "ranks": [world.world_size, str(world.ranks_on_host)],
            "torch": torch.__version__,
        }
    )

"""Data parallelism inside one process: each micro-batch is scattered over replicas, and their outputs are gathered.

On two or more GPUs that is `torch.nn.DataParallel`. On a CPU, where torch would just call the module, replicas are
threads, so that the semantics can be run, compared and tested anywhere. Both take the loss of all outputs together, so
the update is the same as without replicas, however unevenly the samples are scattered (unless the model mixes samples,
as BatchNorm does: then it mixes those of one replica). What is the same for both:

- All tensors are scattered along their first dimension, so all must have as many entries there; numbers, scalar tensors
  and other objects are given to each replica as they are.
- The first replica's buffers (BatchNorm statistics, of its own part of the batch) are kept, those of the others are
  dropped. Other attributes that a forward sets are lost with the replica that set them.
- What can't be put together exactly (a model that returns its mean loss) or would differ from one process (a forward
  that changes parameters) is refused.
- Replicas draw different random numbers, and the same ones for the same seed.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Thread
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distaccum.config import DPConfig
from distaccum.errors import UserError
from distaccum.runtime.nested import to_device
from distaccum.runtime.randomness import DrawDetector, derived_seed
from distaccum.strategies.scattering import Call, batch_size, gather, scatter
from distaccum.strategies.single import SingleStrategy

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_REPLICAS_ON_CPU = 2


class DPStrategy(SingleStrategy):
    """One process with several replicas: it differs from one device only in the module that is called."""

    def __init__(self, model: CheckedDataParallel | ThreadedReplicas) -> None:
        super().__init__(model)
        self.module = model.module

    def state_tensors(self) -> dict[str, Tensor]:
        # The first GPU's generator is the rank's own; replicas draw from those of the others.
        return {f"cuda.{number}": torch.cuda.get_rng_state(number) for number in self._other_gpus()}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        for number in self._other_gpus():
            if f"cuda.{number}" in state:
                torch.cuda.set_rng_state(state[f"cuda.{number}"].cpu(), number)

    def _other_gpus(self) -> list[int]:
        return list(self.model.device_ids[1:]) if isinstance(self.model, nn.DataParallel) else []


def place_dp(module: nn.Module, config: DPConfig, device: torch.device) -> DPStrategy:
    """Prepares a module on the device for replication.

    Raises:
        UserError: there are several processes, or not enough GPUs, or the module can't be replicated.
    """
    if dist.is_initialized() and (world_size := dist.get_world_size()) > 1:
        raise UserError(
            f"strategy=dp is one process with several replicas, and the launcher started {world_size}: each would "
            "train a model of its own. Set strategy=ddp, or start one process."
        )
    _check_replicable(module)
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if gpus == 1:
            raise UserError(
                "strategy=dp needs two or more GPUs, and this host has one, where strategy=single is the same. Set "
                "strategy=single, or device=cpu, where replicas are threads."
            )
        replicas = config.replicas or gpus
        if replicas > gpus:
            raise UserError(
                f"strategy.replicas={replicas} is impossible: each replica needs a GPU of its own, and this host has "
                f"{gpus}. Set strategy.replicas={gpus}, or device=cpu, where replicas are threads."
            )
        logger.info("strategy=dp: DataParallel on GPUs %s", ", ".join(map(str, range(replicas))))
        return DPStrategy(CheckedDataParallel(module, device_ids=list(range(replicas))))
    replicas = config.replicas or DEFAULT_REPLICAS_ON_CPU
    if replicas == 1:
        logger.info("strategy=dp: 1 replica on the CPU, which is the same as strategy=single")
    else:
        logger.info("strategy=dp: %d replicas as threads on the CPU", replicas)
    return DPStrategy(ThreadedReplicas(module, replicas))


def _check_replicable(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise UserError(
                f"strategy=dp can't replicate {name or 'the model'}, a {type(part).__name__} of TorchScript. Give the "
                "model as it was before torch.jit, or set strategy=single or strategy=ddp."
            )
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise UserError(
                f"strategy=dp can't replicate the parameter {name}, whose shape is not known before the first forward. "
                "Give the model its sizes, or run one forward where it is built."
            )


class ThreadedReplicas(nn.Module):
    """Calls replicas of a module on the CPU, one thread each, on parts of the batch.

    A batch of one sample, and a module in evaluation mode, need no replicas: the module itself is called.

    A replica is made anew for each forward, as in `torch.nn.DataParallel`: the same objects all through, but for
    parameters, which are views of the real ones (so gradients add up there), and buffers, which are copies. It follows
    whatever has been changed in the module since, and outlives its forward, as activation checkpointing needs.

    Threads share torch's, Python's and NumPy's random streams, so replicas that draw from them in parallel would get
    what chance gives them. So the first forward runs its replicas one after the other, and so do all that follow if
    random numbers were drawn. A model that draws its first ones later has that forward thrown away and run again.

    Args:
        module: the user's model, on the CPU.
        replicas: how many there are at most; a small batch may make fewer parts.
    """

    def __init__(self, module: nn.Module, replicas: int) -> None:
        super().__init__()
        self.module = module
        self.replicas = replicas
        self._draws: bool | None = None
        """Whether the model has ever drawn random numbers; None before the first forward that had replicas."""

    def extra_repr(self) -> str:
        return f"replicas={self.replicas}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.replicas == 1 or not self.module.training:
            return self.module(*args, **kwargs)
        parts = scatter((args, kwargs), self.replicas)
        if len(parts) == 1:
            return self.module(*args, **kwargs)
        with _parameters_stay(self.module):
            first, outputs = self._run(parts)
        first.hand_over_buffers()
        return gather(outputs, [batch_size(part) for part in parts])

    def _run(self, parts: list[Call]) -> tuple[_Replica, list[Any]]:
        """Returns the first replica, and the outputs of all."""
        randomness = _Randomness(self.module)
        first, outputs = self._run_threads(parts, in_turn=self._draws is not False)
        if not self._draws and randomness.moved:
            logger.info("strategy=dp: the model draws random numbers, so its replicas run one after the other")
            if self._draws is False:
                randomness.restore()
                first, outputs = self._run_threads(parts, in_turn=True)
            self._draws = True
        elif self._draws is None:
            self._draws = False
        return first, outputs

    def _run_threads(self, parts: list[Call], *, in_turn: bool) -> tuple[_Replica, list[Any]]:
        replicas = [_Replica(self.module) for _ in parts]
        modes = _modes_of_this_thread("cpu")
        outcomes: list[Any] = [None] * len(parts)

        def run(number: int) -> None:
            outcomes[number] = _attempting(replicas[number], modes)(*parts[number][0], **parts[number][1])

        # New threads and no pool, in turn too. The backward takes nodes in the order of numbers that each thread counts
        # from 0; so gradients are added up in the same order in each run, and no bit depends on what ran before.
        threads = [Thread(target=run, args=(number,), name=f"replica {number + 1}") for number in range(len(parts))]
        try:
            for thread in threads:
                thread.start()
                if in_turn:
                    thread.join()
        finally:
            for thread in threads:
                if thread.ident is not None:  # it was started
                    thread.join()
        return replicas[0], _successes(outcomes, len(parts))


class CheckedDataParallel(nn.DataParallel[nn.Module]):
    """`torch.nn.DataParallel`, with its silent faults refused or mended.

    It drops samples when tensors have unequal batch sizes; its threads compute in float16 when autocast is to bfloat16;
    it hands out a vector of losses for a model that returns its loss; and after `torch.manual_seed`, all GPUs draw the
    same dropout masks.
    """

    _has_warned = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _parameters_stay(self.module):
            return super().forward(*args, **kwargs)

    def replicate(self, module: nn.Module, device_ids: Sequence[int | torch.device]) -> list[nn.Module]:
        replicas: list[nn.Module] = super().replicate(module, device_ids)
        for replica in replicas:
            for part in replica.modules():
                # A forward that was replaced on the instance (activation checkpointing) would be the original's.
                if isinstance(forward := vars(part).get("forward"), MethodType):
                    part.forward = MethodType(forward.__func__, part)
        return replicas

    def scatter(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any] | None, device_ids: Sequence[int | torch.device]
    ) -> Any:
        parts = scatter((inputs, kwargs or {}), len(device_ids))
        moved = [
            to_device(part, torch.device(device), non_blocking=True, float_dtype=None)
            for part, device in zip(parts, device_ids, strict=False)
        ]
        return tuple(part[0] for part in moved), tuple(part[1] for part in moved)

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Any) -> list[Any]:
        """Returns the output of each replica and its number of samples, as `gather` takes them."""
        set_apart([torch.cuda.default_generators[index] for index in self.device_ids])
        randomness = _Randomness(self.module)
        modes = _modes_of_this_thread("cuda")
        calls: Any = [_attempting(replica, modes) for replica in replicas]
        outputs = _successes(super().parallel_apply(calls, inputs, kwargs), len(replicas))
        if not self._has_warned and randomness.moved:
            self._has_warned = True
            logger.warning(
                "strategy=dp: the model draws random numbers on the CPU; the GPUs' threads share them in no fixed "
                "order, so another run will differ from this one. Draw them on the model's device."
            )
        return list(zip(outputs, map(batch_size, zip(inputs, kwargs, strict=True)), strict=True))

    def gather(self, outputs: Any, output_device: int | torch.device) -> Any:
        values, sizes = zip(*outputs, strict=True)
        return gather(values, sizes, torch.device(output_device))


def set_apart(generators: Sequence[torch.Generator]) -> None:
    """Gives each generator but the first a seed of its own, derived from the first one's, if it has the same seed."""
    seed = generators[0].initial_seed()
    for number, generator in enumerate(generators[1:], 1):
        if generator.initial_seed() == seed:
            generator.manual_seed(derived_seed(seed, "replica", number))


class _Replica:
    """A module of the same structure, over views of the parameters and copies of the buffers."""

    def __init__(self, original: nn.Module) -> None:
        self._originals = list(original.modules())
        self._twins = {id(module): object.__new__(type(module)) for module in self._originals}
        self._module = self._twins[id(original)]
        # Tied tensors stay tied: what was one before is one copy, or one view.
        self._parameters = list(original.parameters())
        self._buffers = {id(tensor): tensor.clone() for tensor in original.buffers()}
        for module in self._originals:
            attributes = {name: self._translated(value) for name, value in vars(module).items()}
            attributes["_buffers"] = _put_in_place(module._buffers, self._buffers)
            attributes["_modules"] = _put_in_place(module._modules, self._twins)
            # Straight into the dictionary: a module's own __setattr__ would want it to be initialised.
            vars(self._twins[id(module)]).update(attributes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward, in a thread of its own."""
        # The views are made here, so that they are numbered with the rest of the replica's graph.
        views = {id(tensor): tensor.view_as(tensor) for tensor in self._parameters}
        for module in self._originals:
            # A module would take a view for no parameter, if it were asked to. Here `parameters()` finds it too.
            vars(self._twins[id(module)])["_parameters"] = _put_in_place(module._parameters, views)
        return self._module(*args, **kwargs)

    def _translated(self, value: Any) -> Any:
        """Returns an attribute with the replica's modules and their methods in the place of the original's."""
        if type(value) in (list, tuple) and value and self._names_modules(value):
            return type(value)(map(self._translated, value))
        if type(value) in (dict, OrderedDict) and value and self._names_modules(value.values()):
            return type(value)((key, self._translated(entry)) for key, entry in value.items())
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self._twins.get(id(value.__self__), value.__self__))
        return self._twins.get(id(value), value) if isinstance(value, nn.Module) else value

    @staticmethod
    def _names_modules(values: Iterable[Any]) -> bool:
        return any(isinstance(value, nn.Module | MethodType) for value in values)

    def hand_over_buffers(self) -> None:
        """Copies the replica's buffers to the original."""
        with torch.no_grad():
            for module in self._originals:
                for name, buffer in self._twins[id(module)]._buffers.items():
                    real = module._buffers.get(name)
                    if buffer is None or real is None or buffer is not self._buffers.get(id(real)):
                        module._buffers[name] = buffer
                    else:
                        # Whether it was changed can't be asked: BatchNorm's kernels don't count their changes.
                        real.copy_(buffer)


def _put_in_place(members: Mapping[str, T | None], others: Mapping[int, T]) -> dict[str, T | None]:
    """Maps the same names to other objects, by the identity of those that they replace."""
    return {name: None if member is None else others[id(member)] for name, member in members.items()}


class _Randomness:
    """The states of the generators that threads share: torch's, Python's, NumPy's, and those that modules hold."""

    def __init__(self, module: nn.Module) -> None:
        held = [value for part in module.modules() for value in vars(part).values() if type(value) is torch.Generator]
        self._held = [(generator, generator.get_state()) for generator in held]
        self._global = DrawDetector()
        self._states = self._global.start()

    @property
    def moved(self) -> bool:
        """True if anything has been drawn since."""
        has_moved_held = any(not torch.equal(generator.get_state(), state) for generator, state in self._held)
        return has_moved_held or self._global.has_drawn()

    def restore(self) -> None:
        self._states.put_back()
        for generator, state in self._held:
            generator.set_state(state)


@contextmanager
def _parameters_stay(module: nn.Module) -> Iterator[None]:
    """Refuses a forward that changes parameters: replicas on a CPU share them, and those of other GPUs are dropped."""
    before = [
        (name, tensor, tensor._version) for name, tensor in module.named_parameters() if not tensor.is_inference()
    ]
    yield
    changed = [name for name, tensor, version in before if tensor._version != version]
    if changed:
        raise UserError(
            f"the model's forward changes its parameter {changed[0]} (as nn.Embedding does with max_norm), which its "
            "replicas would do to each other under strategy=dp. Set strategy=single or strategy=ddp."
        )


def _modes_of_this_thread(device_type: str) -> Callable[[], AbstractContextManager[None]]:
    """Returns a context that sets the gradient mode and autocast of another thread to this one's, as they are now."""
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    cache_enabled = torch.is_autocast_cache_enabled()

    @contextmanager
    def modes() -> Iterator[None]:
        autocast = torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients), autocast:
            yield

    return modes


def _attempting(replica: Callable[..., Any], modes: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    """Wraps a replica so that its call returns an exception instead of raising it."""

    def attempt(*args: Any, **kwargs: Any) -> Any:
        try:
            with modes():
                return replica(*args, **kwargs)
        except BaseException as error:
            return error

    return attempt


def _successes(outcomes: list[Any], replicas: int) -> list[Any]:
    """Returns the outputs of replicas; raises the first exception among them, with the number of its replica."""
    for number, outcome in enumerate(outcomes, 1):
        if isinstance(outcome, BaseException):
            where = f"in replica {number} of {replicas}"
            if type(outcome) is UserError:
                raise UserError(f"{where}: {outcome}") from outcome
            outcome.add_note(where)
            raise outcome
    return outcomes

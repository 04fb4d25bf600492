"""`model.init_on_meta`: a model that is built without memory, sharded, and then initialised shard by shard."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.config import FSDPConfig, StrategyConfig
from distaccum.config.enums import Offload
from distaccum.errors import UserError
from distaccum.runtime.nested import tensors_of
from distaccum.runtime.sharded import is_sharded, local_part
from distaccum.training.recording import NotRecordableError, Recording, View, recorded

_LIBRARY = Path(torch.__file__).parent


def is_deferred(options: Mapping[str, Any], strategy: StrategyConfig) -> bool:
    """Whether a model with these options is to be built without memory.

    Raises:
        UserError: the strategy needs the whole model on each rank.
    """
    if not options.get("init_on_meta"):
        return False
    if not isinstance(strategy, FSDPConfig):
        raise UserError(
            f"model.init_on_meta=true needs strategy=fsdp: with strategy={strategy.name} each rank holds the whole "
            "model anyway. Set model.init_on_meta=false."
        )
    return True


class DeferredModel:
    """A model on the meta device, with the record of how its numbers come about.

    Attributes:
        module: the model. After it has been sharded in place, `initialise` gives it its numbers.
    """

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        """Calls a function that builds a module.

        Raises:
            UserError: the function does what can't be done later.
        """
        self.module, self._recording = _recorded(build)
        members = {name: tensor for name, tensor in _members(self.module) if tensor.device.type == "meta"}
        try:
            self._views: dict[str, View] = {name: self._recording.view_of(value) for name, value in members.items()}
        except NotRecordableError as error:
            raise _refusal(str(error)) from error
        known = {id(tensor) for tensor in members.values()}
        for name, part in self.module.named_modules():
            others = {key: value for key, value in vars(part).items() if key not in ("_parameters", "_buffers")}
            for key, value in others.items():
                if any(tensor.device.type == "meta" and id(tensor) not in known for tensor in tensors_of(value)):
                    raise _refusal(
                        f"{f'{name}.{key}'.lstrip('.')} is a tensor, but neither a parameter nor a buffer. Make it one "
                        "by register_buffer"
                    )

    def initialise(
        self, module: nn.Module, device: torch.device, config: StrategyConfig, *, is_loaded: bool = False
    ) -> None:
        """Gives the placed module its numbers, of each tensor this rank's part, and frees the record.

        Other ranks are not waited for.

        Args:
            module: what was `module`, with parameters that are sharded and without memory still.
            device: where it computes.
            config: how it is sharded.
            is_loaded: the persistent tensors come from a file afterwards, so they need not be initialised.

        Raises:
            UserError: some tensor is never initialised.
        """
        unwritten = [name for name, view in self._views.items() if not self._recording.is_written(view)]
        if unwritten and not is_loaded:
            raise _refusal(f"{unwritten[0]} is made by torch.empty and never initialised")
        is_offloaded = isinstance(config, FSDPConfig) and config.offload is Offload.cpu
        _allocate(module, device, torch.device("cpu") if is_offloaded else device)
        members = dict(_members(module))
        self._recording.replay((view, _Part(members[name])) for name, view in self._views.items())
        self._recording = Recording()


class _Part:
    """Takes a whole tensor, and copies this rank's part of it."""

    def __init__(self, tensor: Tensor) -> None:
        self._own, self._slices = local_part(tensor)

    def __call__(self, whole: Tensor) -> None:
        self._own.copy_(whole[self._slices])


def _recorded(build: Callable[[], nn.Module]) -> tuple[nn.Module, Recording]:
    try:
        with recorded() as recording:
            return build(), recording
    except NotRecordableError as error:
        raise _refusal(f"{error}{_place(error)}") from error
    except (RuntimeError, TypeError, ValueError) as error:  # NotImplementedError is a RuntimeError
        if "meta" not in str(error).lower():
            raise
        raise _refusal(f"{str(error).splitlines()[0].rstrip('.')}{_place(error)}") from error


def _refusal(reason: str) -> UserError:
    return UserError(
        f"model.init_on_meta=true: the model can't be built without memory, as {reason}. Set model.init_on_meta=false."
    )


def _place(error: BaseException) -> str:
    """Says where in the user's own code an error came up."""
    own = [_LIBRARY, Path(__file__).parent.parent]
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not any(Path(frame.filename).is_relative_to(folder) for folder in own)]
    return f" (in {Path(outside[-1].filename).name}, line {outside[-1].lineno})" if outside else ""


def _members(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _allocate(module: nn.Module, device: torch.device, shards_on: torch.device) -> None:
    """Gives the tensors of a module memory on a device; those that have some already are moved."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def allocated(tensor: Tensor) -> Tensor:
        belongs = shards_on if is_sharded(tensor) else device
        if tensor.device.type != "meta":
            return tensor.to(belongs)
        if is_sharded(tensor):
            return torch.empty_like(tensor, device=belongs)
        # Kept with the new one, so that no other has its number: a buffer may be in several places.
        return made.setdefault(id(tensor), (tensor, torch.empty_like(tensor, device=device)))[1]

    module._apply(allocated)  # type: ignore[no-untyped-call]

"""Devices and precisions: chooses and checks them, and reads their clocks."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.config.enums import DeviceChoice, PrecisionName
from distaccum.errors import UserError


def resolve_device(choice: DeviceChoice, local_rank: int = 0) -> torch.device:
    """The device of this rank.

    Raises:
        UserError: CUDA was asked for and there is none, or fewer GPUs than ranks on this host.
    """
    if choice is DeviceChoice.cpu or (choice is DeviceChoice.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise UserError(f"device=cuda, but {build}. Set device=cpu or device=auto, or mend the CUDA installation.")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"this host has {count} GPU{'' if count == 1 else 's'}, too few for local rank {local_rank}: every rank "
            f"needs one of its own. Start {count} process{'' if count == 1 else 'es'} a host, or set device=cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts a module's floating-point parameters and buffers in place, complex ones to the format's counterpart.

    `module.to(dtype)` would drop the imaginary parts.
    """
    module._apply(lambda tensor: tensor.to(own_kind(tensor, dtype)))  # type: ignore[no-untyped-call]
    return module


def own_kind(tensor: Tensor, float_dtype: torch.dtype) -> torch.dtype:
    """The format to cast a tensor to: a complex one to the format's counterpart, and no integers."""
    if tensor.is_complex():
        return float_dtype.to_complex()
    return float_dtype if tensor.is_floating_point() else tensor.dtype


class Stopwatch:
    """Reads a device's own clock without making the host wait for the device.

    A mark on CUDA is an event in the current stream; the seconds between two marks may be asked for once the host has
    waited for the later one.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3 if self._on_cuda else float(end - start)


@dataclass(frozen=True, slots=True)
class Precision:
    """A floating-point format to compute in, on one device. Made by `resolve_precision`."""

    name: PrecisionName
    device_type: str

    @property
    def parameter_dtype(self) -> torch.dtype:
        return {PrecisionName.fp64: torch.float64, PrecisionName.bf16_params: torch.bfloat16}.get(
            self.name, torch.float32
        )

    @property
    def input_dtype(self) -> torch.dtype | None:
        """Returns the format that floating-point inputs are cast to; None where they may stay as they are."""
        return None if self.parameter_dtype is torch.float32 else self.parameter_dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Encloses forwards. Does nothing unless the precision is bf16 or fp16."""
        if self.name is PrecisionName.bf16:
            return torch.autocast(self.device_type, torch.bfloat16)
        if self.name is PrecisionName.fp16:
            return torch.autocast(self.device_type, torch.float16)
        return nullcontext()


def resolve_precision(name: PrecisionName, device: torch.device) -> Precision:
    """Checks by trying that a device can compute in a precision.

    Raises:
        UserError: it cannot.
    """
    precision = Precision(name, device.type)
    if name not in (PrecisionName.bf16, PrecisionName.fp16):
        return precision
    try:
        inputs = torch.ones(2, 3, 4, 4, device=device, requires_grad=True)
        kernels = torch.ones(3, 3, 3, 3, device=device, requires_grad=True)
        with precision.autocast():
            hidden = torch.nn.functional.conv2d(inputs, kernels).flatten(1)
            loss = torch.nn.functional.linear(hidden, hidden).float().sum()
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"precision={name.value} can't run on this {device.type}: {reason}. Set precision=bf16 or precision=fp32."
        ) from error
    return precision

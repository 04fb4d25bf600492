from __future__ import annotations

import time
from collections import OrderedDict, namedtuple

import pytest
import torch

from distaccum.config.enums import DeviceChoice, PrecisionName
from distaccum.errors import UserError
from distaccum.runtime.devices import Stopwatch, resolve_device, resolve_precision
from distaccum.runtime.memory import peak_memory
from distaccum.runtime.nested import tensors_of, to_device

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "first second")


def test_devices_are_chosen() -> None:
    assert resolve_device(DeviceChoice.cpu) == CPU
    if torch.cuda.is_available():
        assert resolve_device(DeviceChoice.auto) == torch.device("cuda", 0)
        with pytest.raises(UserError, match="too few for local rank 99"):
            resolve_device(DeviceChoice.cuda, local_rank=99)
    else:
        assert resolve_device(DeviceChoice.auto) == CPU
        with pytest.raises(UserError, match="device=cuda, but"):
            resolve_device(DeviceChoice.cuda)


def test_nested_batches_are_moved_and_cast() -> None:
    batch = {"pair": Pair(torch.ones(2), [torch.arange(2), "a name"]), "none": None}
    moved = to_device(batch, CPU, float_dtype=torch.float64)
    assert moved["pair"].first.dtype == torch.float64
    assert moved["pair"].second[0].dtype == torch.int64
    assert moved["pair"].second[1] == "a name"
    assert moved["none"] is None
    assert len(tensors_of(moved)) == 2


def test_an_object_that_can_move_itself_does() -> None:
    class Graph:
        device = "nowhere"

        def to(self, device: torch.device) -> Graph:
            self.device = str(device)
            return self

    assert to_device((Graph(),), CPU, float_dtype=None)[0].device == "cpu"


def test_the_stopwatch_runs() -> None:
    watch = Stopwatch(CPU)
    start = watch.mark()
    time.sleep(0.01)
    assert 0.005 < watch.seconds(start, watch.mark()) < 5


def test_peak_memory_is_that_of_this_process() -> None:
    memory, kind = peak_memory(CPU)
    assert 50e6 < memory < 1e12
    assert kind == "resident set"


@pytest.mark.parametrize("name", PrecisionName)
def test_precisions_compute_in_what_they_say(name: PrecisionName) -> None:
    try:
        precision = resolve_precision(name, CPU)
    except UserError as error:
        assert name is PrecisionName.fp16
        assert "precision=fp16 can't run" in str(error)  # noqa: PT017
        return
    layer = torch.nn.Linear(2, 2).to(precision.parameter_dtype)
    with precision.autocast():
        found = layer(torch.ones(1, 2, dtype=precision.parameter_dtype)).dtype
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    wanted["bf16_params"] = torch.bfloat16
    assert found == wanted[name.value]


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("\"addmm\" not implemented for 'Half'\nmore")

    monkeypatch.setattr(torch.nn.functional, "linear", broken)
    with pytest.raises(UserError, match=r"precision=fp16 can't run on this cpu: .*not implemented for 'Half'\. Set"):
        resolve_precision(PrecisionName.fp16, CPU)


@pytest.mark.gpu
def test_the_stopwatch_reads_the_gpu() -> None:
    device = torch.device("cuda", 0)
    watch = Stopwatch(device)
    start = watch.mark()
    torch.cuda._sleep(10_000_000)
    end = watch.mark()
    torch.cuda.synchronize()
    assert watch.seconds(start, end) > 1e-3
    assert peak_memory(device)[1] == "of device memory"


def test_mappings_keep_their_type() -> None:
    moved = to_device(OrderedDict(a=torch.ones(1)), CPU, float_dtype=torch.float64)
    assert type(moved) is OrderedDict
    assert moved["a"].dtype == torch.float64

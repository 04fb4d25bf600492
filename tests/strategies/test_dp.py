"""Replicas in one process. On the CPU they are threads; what needs two GPUs is at the end."""

from __future__ import annotations

import logging
import random
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from command_line import Ended, evaluations, updates
from examples import TokenClassifier, curves, distance, flat, token_loss, train_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distaccum import UserError
from distaccum.config import DPConfig
from distaccum.models import GPT
from distaccum.strategies import DPStrategy, dp, place
from distaccum.strategies.dp import CheckedDataParallel, ThreadedReplicas, place_dp, set_apart
from distaccum.strategies.scattering import gather

CPU = torch.device("cpu")


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns every few bytecodes, so that those who race do it in a test."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def _settled(module: nn.Module, replicas: int, *args: Any) -> ThreadedReplicas:
    """Replicas past their first forward, so that they run in parallel from now on if they may; gradients cleared."""
    model = ThreadedReplicas(module, replicas)
    model(*args)
    model.zero_grad()
    return model


def _inputs(batch_size: int, *shape: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, *shape, generator=generator, dtype=torch.float64)


def _gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])


def _pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Two modules of equal parameters."""
    modules = []
    for _ in range(2):
        torch.manual_seed(5)
        modules.append(make().double())
    return modules[0], modules[1]


# The update is that of one process


WINDOWS = {
    "uniform": {"global_batch_size": 8, "micro_batch_size": 8, "drop_last": True},
    "accumulated": {"global_batch_size": 16, "micro_batch_size": 5},
    "ragged": {"global_batch_size": 16, "micro_batch_size": 7, "updates": 7},
    "one sample each": {"global_batch_size": 3, "micro_batch_size": 1},
    "one shot": {"global_batch_size": 41, "micro_batch_size": 41},
}
"""Of 41 sequences of unequal lengths with targets left out. Where not uniform, an epoch's last window is smaller."""


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", WINDOWS.values(), ids=WINDOWS.keys())
def test_the_update_is_that_of_one_process(batch: dict[str, Any], replicas: int) -> None:
    options = {"updates": 4, **batch}
    wanted, wanted_parameters = train_tokens(None, **options)
    found, parameters = train_tokens(DPConfig(replicas=replicas), **options)  # type: ignore[arg-type]
    assert distance(curves(found)[0], curves(wanted)[0]) < 1e-12
    assert distance(curves(found)[1], curves(wanted)[1]) < 1e-12
    assert distance(parameters, wanted_parameters) < 1e-12
    assert all(result.sync_calls == 0 for result in found)


def test_taking_the_loss_inside_the_replicas_would_have_been_seen() -> None:
    """What people do with DataParallel: each replica returns its mean loss, and the means are averaged."""

    def mean_of_means(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        parts = zip(*(tensor.chunk(3) for tensor in batch), strict=True)
        sums = [token_loss(model, part) for part in parts]
        weight = torch.stack([weight for _, weight in sums]).sum()
        return torch.stack([loss / count.clamp(min=1) for loss, count in sums]).mean() * weight, weight

    wanted, wanted_parameters = train_tokens(None, micro_batch_size=7, updates=4)
    found, parameters = train_tokens(None, micro_batch_size=7, updates=4, loss=mean_of_means)
    assert distance(curves(found)[0], curves(wanted)[0]) > 1e-3
    assert distance(parameters, wanted_parameters) > 1e-3


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 13), st.integers(1, 5), st.integers(0, 2**20))
def test_gradients_for_any_batch_size(batch_size: int, replicas: int, seed: int) -> None:
    plain, module = _pair(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    inputs = _inputs(batch_size, 3, seed=seed)
    model = ThreadedReplicas(module, replicas)
    for _ in range(2):  # in turn, then in parallel
        outputs = model(inputs)
        assert torch.allclose(outputs, plain(inputs), rtol=1e-13, atol=1e-14)  # terms of a sum may cancel
        outputs.square().sum().backward()
        plain(inputs).square().sum().backward()
    assert distance(_gradients(module), _gradients(plain)) < 1e-12


@pytest.mark.usefixtures("hasty")
def test_replicas_do_not_race_and_no_bit_depends_on_their_threads() -> None:
    module = GPT(vocab_size=11, max_length=12, num_layers=2, num_heads=2, width=16).double()
    tokens = torch.randint(0, 11, (10, 12), generator=torch.Generator().manual_seed(1))
    model = ThreadedReplicas(module, 4)
    in_threads: list[int] = []
    module.register_forward_pre_hook(lambda *_: in_threads.append(threading.get_ident()))
    model(tokens).square().sum().backward()
    wanted = _gradients(module).requires_grad_()  # of replicas that ran one after the other
    for repeat in range(50):
        model.zero_grad()
        for _ in range(repeat * 20):
            wanted.sum()  # gives other numbers to the nodes of this thread
        model(tokens).square().sum().backward()
        assert torch.equal(_gradients(module), wanted)
    assert len(in_threads) == 4 * 51
    assert threading.get_ident() not in in_threads


class Rows(nn.Module):
    """Attributes that lead around the registered submodules, to themselves and to a method."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.rows = [self.norm]
        self.named = {"norm": self.norm}
        self.last = self._last

    def _last(self, inputs: Tensor) -> Tensor:
        return self.norm(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.named["norm"](self.rows[0](inputs)))


class Recomputed(nn.Module):
    """Activation checkpointing: the backward calls the replica once more, after its forward has long returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.first(inputs)
        return checkpoint(lambda given: torch.tanh(self.second(torch.tanh(given))), hidden, use_reentrant=False)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(6, 5, num_layers=2, batch_first=True)

    def forward(self, inputs: Tensor) -> Any:
        return self.cells(inputs)[0]


class Listed(nn.Module):
    """Parameters in a list, found through `parameters()` in the forward too."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(2)])

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.to(next(self.parameters()).dtype) * self.factors[0] * list(self.parameters())[1]


@pytest.mark.parametrize(
    "make",
    [
        Recomputed,
        Recurrent,
        Listed,
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)),
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
    ],
    ids=["checkpointing", "LSTM", "ParameterList", "weight_norm", "transformer"],
)
def test_models_that_are_hard_to_replicate(make: Callable[[], nn.Module]) -> None:
    plain, module = _pair(make)
    inputs = _inputs(5, 4, 6)
    model = ThreadedReplicas(module, 3)
    for _ in range(2):
        model(inputs).square().sum().backward()
        plain(inputs).square().sum().backward()
    assert model._draws is False
    assert distance(_gradients(module), _gradients(plain)) < 1e-12


def test_tied_parameters_stay_tied() -> None:
    plain, module = _pair(lambda: GPT(vocab_size=11, max_length=12, num_layers=1, num_heads=2, width=8))
    assert isinstance(module, GPT)
    tokens = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(1))
    model = ThreadedReplicas(module, 3)
    # The model above uses one parameter twice; here two modules hold the same one.
    module.other = nn.Linear(8, 11, bias=False)
    module.other.weight = module.token_embedding.weight
    same = []
    module.other.register_forward_pre_hook(lambda head, _: same.append(head.weight))
    module.register_forward_pre_hook(lambda gpt, _: same.append(gpt.token_embedding.weight))
    module.register_forward_hook(lambda gpt, _, logits: gpt.other(torch.ones(1, 8).double()) * 0 + logits)
    for _ in range(2):
        same.clear()
        model(tokens).square().sum().backward()
        plain(tokens).square().sum().backward()
        assert len(same) == 2 * 3
        assert len({id(weight) for weight in same}) == 3
    assert module.other.weight is module.token_embedding.weight
    assert distance(_gradients(module), _gradients(plain)) < 1e-12


def test_frozen_parameters_stay_frozen_and_changes_of_the_model_are_followed() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    model = _settled(module, 2, _inputs(4, 3))
    module[0].requires_grad_(False)
    model(_inputs(4, 3)).sum().backward()
    assert module[0].weight.grad is None
    assert module[2].weight.grad is not None
    assert next(name for name, _ in model.named_parameters()) == "module.0.weight"
    module[1].eval()  # a part of the model
    assert torch.equal(model(_inputs(4, 3)), model(_inputs(4, 3)))
    module[1] = nn.Identity()
    module[0].requires_grad_(True)
    model(_inputs(4, 3)).sum().backward()
    assert module[0].weight.grad is not None


def test_evaluation_and_one_sample_call_the_module_itself() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    model = ThreadedReplicas(module, 3)
    called: list[nn.Module] = []
    module.register_forward_pre_hook(lambda called_module, _: called.append(called_module))
    model.eval()
    model(_inputs(6, 3))
    module.train()
    model(_inputs(6, 3))
    module[1].eval()
    model(_inputs(1, 3))
    assert [one is module for one in called] == [True, False, False, False, True]


# Buffers


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("batch_size", [8, 7, 2])
def test_batchnorm_keeps_the_first_replicas_statistics(batch_size: int) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double()
    first, *others = (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double() for _ in range(3))
    for twin in (first, *others):
        twin.load_state_dict(module.state_dict())
    model = ThreadedReplicas(module, 3)
    for number in range(1, 4):
        images = _inputs(batch_size, 1, 5, 5, seed=number)
        outputs = model(images)
        wanted = [twin(part) for twin, part in zip((first, *others), images.chunk(3), strict=False)]
        assert torch.allclose(outputs, torch.cat(wanted), rtol=1e-13, atol=1e-15)
        assert all(map(torch.equal, module.buffers(), first.buffers()))
        assert int(module[1].num_batches_tracked) == number
    outputs.square().sum().backward()
    torch.cat(wanted).square().sum().backward()
    added = sum(_gradients(twin) for twin in (first, *others) if twin[0].weight.grad is not None)
    assert distance(_gradients(module), added) < 1e-12


@pytest.mark.usefixtures("hasty")
def test_modules_in_plain_attributes_are_the_replicas_own() -> None:
    module, twin = Rows().double(), Rows().double()
    model = ThreadedReplicas(module, 3)
    for number in range(1, 4):
        model(_inputs(8, 2, seed=number))
        twin(_inputs(8, 2, seed=number)[:3])
        assert int(module.norm.num_batches_tracked) == 3 * number
        assert all(map(torch.equal, module.buffers(), twin.buffers()))


class Counting(nn.Module):
    """Buffers of all sorts: none yet, bound anew in the forward, and one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("largest", None)
        self.register_buffer("same", self.total, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.total += len(inputs)
        assert self.same is self.total
        self.largest = inputs.detach().max()
        return inputs * self.weight


def test_buffers_of_all_sorts() -> None:
    module = Counting()
    model = ThreadedReplicas(module, 3)
    inputs = torch.arange(14.0).reshape(7, 2)
    total = module.total
    for number in range(1, 3):
        model(inputs)
        assert module.total is total
        assert module.total.tolist() == 3 * number
        assert module.largest is not None
        assert module.largest.tolist() == 5.0
    assert list(module.state_dict()) == ["weight", "total", "largest"]


# Randomness


class Noise(nn.Module):
    """Adds noise from one source, from the given forward on."""

    def __init__(self, draw: Callable[[Tensor], Tensor], first: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.draw = draw
        self.first = first
        self.generator = torch.Generator().manual_seed(3)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        self.forwards += 1
        hidden = inputs * self.weight
        for _ in range(20):  # gives other threads time to come in between
            if self.forwards >= self.first:
                hidden = hidden + self.draw(hidden)
        return hidden


def _own_generator(noise: Noise) -> Noise:
    noise.draw = lambda hidden: torch.rand(hidden.shape, generator=noise.generator)
    return noise


SOURCES: dict[str, Callable[[int], nn.Module]] = {
    "dropout": lambda first: Noise(lambda hidden: F.dropout(hidden, 0.5), first),
    "python": lambda first: Noise(lambda hidden: hidden * random.random(), first),
    "numpy": lambda first: Noise(lambda hidden: hidden * float(np.random.rand()), first),
    "own generator": lambda first: _own_generator(Noise(torch.zeros_like, first)),
}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("first", [1, 3], ids=["from the start", "from the third forward"])
@pytest.mark.parametrize("source", SOURCES)
def test_randomness_is_reproducible_and_differs_between_replicas(
    source: str, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    def run(draws: bool | None = None) -> list[Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        module = SOURCES[source](first)
        model = ThreadedReplicas(module, 4)
        model._draws = draws
        with caplog.at_level(logging.INFO, logger="distaccum"):
            outputs = [model(torch.ones(4, 4)) for _ in range(4)]
        assert int(module.forwards) == 4  # though one of them was run again
        return outputs

    wanted = run()
    for _ in range(10):
        assert all(map(torch.equal, run(), wanted))
    for number, outputs in enumerate(wanted, 1):
        assert len({tuple(row) for row in outputs.tolist()}) == (1 if number < first else 4)
    assert caplog.messages.count(caplog.messages[0]) == len(caplog.messages) == 11
    assert "one after the other" in caplog.messages[0]
    assert all(map(torch.equal, run(draws=True), wanted))  # as if it had always been known


def test_a_gpt_with_dropout_draws_as_it_would_part_by_part() -> None:
    plain, module = _pair(lambda: GPT(vocab_size=11, max_length=12, num_layers=2, num_heads=2, width=8, dropout=0.3))
    tokens = torch.randint(0, 11, (7, 6), generator=torch.Generator().manual_seed(1))
    model = ThreadedReplicas(module, 3)
    torch.manual_seed(1)
    found = torch.cat([model(tokens) for _ in range(2)])
    torch.manual_seed(1)
    wanted = torch.cat([plain(part) for _ in range(2) for part in tokens.chunk(3)])
    assert torch.allclose(found, wanted, rtol=1e-12, atol=0)


def test_generators_with_the_same_seed_are_set_apart() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 3, 4, 3)]
    set_apart(generators)
    seeds = [generator.initial_seed() for generator in generators]
    assert (seeds[0], seeds[2]) == (3, 4)
    assert len(set(seeds)) == 4
    again = [torch.Generator().manual_seed(3) for _ in range(2)]
    set_apart(again)
    assert again[1].initial_seed() == seeds[1]


# What goes in and what comes out


class Point(NamedTuple):
    place: Tensor
    label: str


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, point: Point, *more: Any, options: Any, factor: Tensor) -> Any:
        assert point.label == "same for all"
        assert options["number"] == 3
        return {
            "point": Point(point.place * self.weight * factor, point.label),
            "list": [entry * self.weight for entry in more[0]],
            "tuple": (options["deep"][0]["tensor"] * self.weight, None, 7, "text"),
            "samples": len(point.place),
        } | ({} if options["sizes"] else {"samples": 0})


@pytest.mark.parametrize("mapping", [dict, lambda pairs: defaultdict(int, pairs), MappingProxyType])
def test_nested_inputs_and_outputs(mapping: Callable[[Any], Any]) -> None:
    plain, module = Nested(), Nested()
    model = ThreadedReplicas(module, 3)
    point, a, b, c = Point(_inputs(7, 2), "same for all"), _inputs(7), _inputs(7, 1, 3), _inputs(7, 4)
    options = mapping({"number": 3, "deep": ({"tensor": c},), "sizes": False})
    for _ in range(2):
        found = model(point, [a, b], options=options, factor=torch.tensor(2.0))
    wanted = plain(point, [a, b], options=options, factor=torch.tensor(2.0))
    assert isinstance(found["point"], Point)
    assert torch.equal(found["point"].place, wanted["point"].place)
    assert all(map(torch.equal, found["list"], wanted["list"]))
    assert torch.equal(found["tuple"][0], wanted["tuple"][0])
    assert found["tuple"][1:] == (None, 7, "text")
    with pytest.raises(UserError, match=r"output\['samples'\] can't be put together from those of 3 replicas: 3, 3, 1"):
        model(point, [a, b], options={**options, "sizes": True}, factor=torch.tensor(2.0))


def test_inputs_of_unequal_batch_size_are_refused() -> None:
    """`torch.nn.DataParallel` would leave the samples out that the shorter one doesn't have."""
    model = ThreadedReplicas(nn.Bilinear(2, 2, 1), 2)
    with pytest.raises(UserError, match=r"unequal size there: \[6, 2\], \[3, 2\]"):
        model(torch.ones(6, 2), torch.ones(3, 2))


def test_a_model_that_is_called_without_samples_is_called_once() -> None:
    class Constant(nn.Module):
        def forward(self, length: int) -> Tensor:
            return torch.zeros(length)

    assert len(ThreadedReplicas(Constant(), 2)(3)) == 3
    assert ThreadedReplicas(nn.Linear(3, 2), 2)(torch.ones(0, 3)).shape == (0, 2)


class Returns(nn.Module):
    """Returns what a function makes of its inputs."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.make = make

    def forward(self, inputs: Tensor) -> Any:
        return self.make(inputs * self.weight)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda x: x.mean(), r"the model's output is a scalar in each of 3 replicas.* mean of their means is wrong"),
        (lambda x: {"loss": x.mean(), "logits": x}, r"output\['loss'\] is a scalar"),
        (lambda x: (x, [x, x.sum()]), r"output\[1\]\[1\] is a scalar"),
        (lambda x: x.mean()[None], r"output has shapes \[1\], \[1\], \[1\] in replicas that had 3, 3, 1 samples"),
        (lambda x: x[:2], r"output has shapes \[2, 3\], \[2, 3\], \[1, 3\] in replicas that had 3, 3, 1 samples"),
        (lambda x: x.T @ x, r"output has shapes \[3, 3\], \[3, 3\], \[3, 3\] in replicas that had 3, 3, 1"),
        (lambda x: x[:, : len(x)], r"shapes that don't fit together: \[3, 3\], \[3, 3\], \[1, 1\]"),
        (lambda x: x if len(x) == 3 else None, "not of the same type in all replicas: Tensor, Tensor, NoneType"),
        (lambda x: {len(x): x}, r"not the same keys in all replicas: \[3\]; \[3\]; \[1\]"),
        (lambda x: list(x), r"not the same number of entries in all replicas: 3, 3, 1"),
        (lambda x: x.sum().item(), "can't be put together from those of 3 replicas: "),
        (lambda x: {1, 2}, r"can't be put together from those of 3 replicas: \{1, 2\}"),
    ],
)
def test_outputs_that_do_not_fit_together_are_refused(make: Callable[[Tensor], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ThreadedReplicas(Returns(make), 3)(_inputs(7, 3))


def test_a_multiple_of_the_samples_is_put_together() -> None:
    inputs = _inputs(7, 3)
    assert torch.equal(ThreadedReplicas(Returns(torch.flatten), 3)(inputs), inputs.flatten())
    assert gather([None, None], [2, 1]) is None


def test_exceptions_say_which_replica_it_was() -> None:
    def fail_on_negative(inputs: Tensor) -> Tensor:
        if bool((inputs < 0).any()):
            raise ZeroDivisionError(f"negative in {len(inputs)}")
        return inputs

    module = Returns(fail_on_negative)
    module.register_buffer("count", torch.zeros(()))

    def count(replica: nn.Module, _: Any) -> None:
        replica.count += 1

    module.register_forward_pre_hook(count)
    fine = torch.ones(7, 2)
    broken = fine.clone()
    broken[4] = broken[6] = -1
    for model in (ThreadedReplicas(module, 3), _settled(module, 3, fine)):
        before = float(module.count)
        with pytest.raises(ZeroDivisionError, match="negative in 3") as caught:
            model(broken)
        assert caught.value.__notes__ == ["in replica 2 of 3"]
        assert float(module.count) == before
        assert model(fine).shape == (7, 2)
    with pytest.raises(UserError, match=r"^in replica 1 of 2: GPT: tokens of shape \[1, 13\] do not fit"):
        ThreadedReplicas(GPT(vocab_size=3, max_length=12, num_layers=1, num_heads=1, width=2), 2)(
            torch.zeros(2, 13, dtype=torch.int64)
        )


def test_a_forward_that_changes_parameters_is_refused() -> None:
    model = ThreadedReplicas(nn.Embedding(5, 3, max_norm=0.1), 2)
    with pytest.raises(UserError, match=r"changes its parameter weight \(as nn.Embedding does with max_norm\)"):
        model(torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradient_mode_hold_inside_the_replicas(dtype: torch.dtype) -> None:
    module = nn.Linear(3, 2)
    inputs = torch.ones(4, 3)
    model = _settled(module, 2, inputs)
    modes: set[tuple[bool, bool]] = set()
    module.register_forward_pre_hook(lambda *_: modes.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled())))
    with torch.autocast("cpu", dtype):
        outputs = model(inputs)
        assert outputs.dtype is dtype
        with torch.autocast("cpu", enabled=False):
            assert model(inputs).dtype is torch.float32
        assert torch.equal(outputs, module(inputs))
    assert modes == {(True, False)}
    modes.clear()
    with torch.no_grad():
        assert not model(inputs).requires_grad
    assert modes == {(False, False)}
    modes.clear()
    with torch.inference_mode():
        assert model(inputs).is_inference()
    assert modes == {(False, True)}
    assert model(inputs).dtype is torch.float32


# Placing


def test_placing_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Linear(3, 2)
    with caplog.at_level(logging.INFO, logger="distaccum"):
        for replicas in (None, 3, 1):
            strategy = place(module, DPConfig(replicas=replicas), CPU)
            assert isinstance(strategy, DPStrategy)
            assert strategy.module is module
            assert isinstance(strategy.model, ThreadedReplicas)
            assert strategy.model.replicas == replicas or replicas is None
            assert (strategy.device, strategy.world_size, strategy.process_group) == (CPU, 1, None)
            assert not strategy.equal_micro_steps
    assert caplog.messages == [
        "strategy=dp: 2 replicas as threads on the CPU",
        "strategy=dp: 3 replicas as threads on the CPU",
        "strategy=dp: 1 replica on the CPU, which is the same as strategy=single",
    ]
    assert "replicas=3" in repr(ThreadedReplicas(module, 3))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 3)
    with pytest.raises(UserError, match="the launcher started 3: each would train a model of its own"):
        place(nn.Linear(3, 2), DPConfig(), CPU)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 1)
    assert place(nn.Linear(3, 2), DPConfig(), CPU).world_size == 1
    monkeypatch.setattr(dist, "is_initialized", lambda: False)


@pytest.mark.parametrize(
    ("gpus", "replicas", "said"),
    [
        (1, None, "needs two or more GPUs, and this host has one, where strategy=single is the same"),
        (1, 2, "needs two or more GPUs, and this host has one"),
        (2, 3, r"strategy.replicas=3 is impossible: .* this host has 2. Set strategy.replicas=2, or device=cpu"),
    ],
)
def test_too_few_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, gpus: int, replicas: int | None, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=said):
        place_dp(nn.Linear(3, 2), DPConfig(replicas=replicas), torch.device("cuda", 0))


def test_modules_that_can_not_be_replicated_are_refused() -> None:
    with pytest.raises(UserError, match=r"can't replicate the parameter 0.weight, whose shape is not known"):
        place(nn.Sequential(nn.LazyLinear(3)), DPConfig(), CPU)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_refused() -> None:
    with pytest.raises(UserError, match="can't replicate 0, a RecursiveScriptModule of TorchScript"):
        place(nn.Sequential(torch.jit.script(nn.Linear(3, 2))), DPConfig(), CPU)


def test_a_whole_run_is_that_of_one_process(train: Callable[..., Ended]) -> None:
    arguments = ["data=synthetic", "model=cnn", "train.max_updates=3", "wandb.mode=disabled", "precision=fp64"]
    arguments += ["device=cpu", "batch.global_batch_size=32", "batch.micro_batch_size=13", "data.num_samples=96"]
    single = train(*arguments, "strategy=single", "run_dir=single")
    replicated = train(*arguments, "strategy=dp", "strategy.replicas=3", "run_dir=dp")
    assert (single.status, replicated.status, replicated.err) == (0, 0, "")
    for name in ("loss", "grad_norm", "weight"):
        assert distance([u[name] for u in updates(Path("dp"))], [u[name] for u in updates(Path("single"))]) < 1e-12
    assert len(updates(Path("dp"))) == 3
    assert evaluations(Path("dp"))[-1]["eval"] == pytest.approx(evaluations(Path("single"))[-1]["eval"], rel=1e-12)
    said = "strategy=dp: 3 replicas as threads on the CPU"
    assert said in replicated.out
    assert said in Path("dp/logs/rank0.log").read_text()
    assert "no sync needed" in replicated.out


# DataParallel


def _without_gpus() -> CheckedDataParallel:
    """`torch.nn.DataParallel` with its threads replaced by a loop over devices that are all the CPU."""
    model = CheckedDataParallel(nn.Linear(3, 2).double())
    model.device_ids = []
    return model


def test_data_parallel_scatters_and_gathers_as_threads_do() -> None:
    model = _without_gpus()
    inputs = _inputs(5, 3)
    parts, kwargs = model.scatter((inputs, 3), {"scale": torch.tensor(2.0)}, [CPU] * 4)
    assert [len(part[0]) for part in parts] == [2, 2, 1]
    assert [part[1] for part in parts] == [3, 3, 3]
    assert [set(part) for part in kwargs] == [{"scale"}] * 3
    sized = list(zip([part[0] for part in parts], [2, 2, 1], strict=True))
    assert torch.equal(model.gather(sized, CPU), inputs)
    with pytest.raises(UserError, match="is a scalar in each of 2 replicas"):
        model.gather([(torch.tensor(1.0), 2), (torch.tensor(1.0), 1)], CPU)
    with pytest.raises(UserError, match="unequal size there"):
        model.scatter((inputs, inputs[:3]), None, [CPU] * 2)


@pytest.fixture
def on_two_cpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.Generator]:
    """Has DataParallel's replicas run in turn, on the CPU; gives what they take for the generators of the GPUs."""
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    modes = dp._modes_of_this_thread
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(dp, "_modes_of_this_thread", lambda _: modes("cpu"))
    monkeypatch.setattr(
        nn.DataParallel,
        "parallel_apply",
        lambda _, replicas, inputs, kwargs: [
            replica(*args, **options) for replica, args, options in zip(replicas, inputs, kwargs, strict=True)
        ],
    )
    return generators


def test_data_parallel_tells_replicas_apart(
    on_two_cpus: list[torch.Generator], caplog: pytest.LogCaptureFixture
) -> None:
    module = Returns(lambda x: x + torch.rand(()) if bool((x >= 0).all()) else x / [])
    model = CheckedDataParallel(module)
    model.device_ids = [0, 1]
    for _ in range(2):
        parts, kwargs = model.scatter((torch.ones(3, 2),), {}, [CPU] * 2)
        outputs = model.gather(model.parallel_apply([module] * 2, parts, kwargs), CPU)
        assert outputs.shape == (3, 2)
    assert on_two_cpus[0].initial_seed() == 3 != on_two_cpus[1].initial_seed()
    assert len(caplog.messages) == 1
    assert "draws random numbers on the CPU" in caplog.messages[0]
    parts, kwargs = model.scatter((torch.tensor([1.0, 1.0, -1.0]),), {}, [CPU] * 2)
    with pytest.raises(TypeError) as caught:
        model.parallel_apply([module] * 2, parts, kwargs)
    assert caught.value.__notes__ == ["in replica 2 of 2"]


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@needs_two_gpus
def test_data_parallel_on_two_gpus_is_exact(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda", 0)
    plain, module = TokenClassifier().to(device), TokenClassifier()
    with caplog.at_level(logging.INFO, logger="distaccum"):
        strategy = place(module, DPConfig(replicas=2), device)
    assert caplog.messages == ["strategy=dp: DataParallel on GPUs 0, 1"]
    assert isinstance(strategy.model, nn.DataParallel)
    for batch_size in (1, 2, 5, 8):
        tokens = torch.randint(0, 11, (batch_size, 6), generator=torch.Generator().manual_seed(1)).to(device)
        strategy.model(tokens).square().sum().backward()
        plain(tokens).square().sum().backward()
    assert distance(_gradients(module).cpu(), _gradients(plain).cpu()) < 1e-12
    assert distance(flat(module).cpu(), flat(plain).cpu()) == 0


@pytest.mark.gpu
@needs_two_gpus
def test_data_parallel_on_two_gpus_is_right_where_torch_is_not() -> None:
    device = torch.device("cuda", 0)
    module = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5))
    model = place(module, DPConfig(replicas=2), device).model
    inputs = torch.ones(2, 3, device=device)
    with torch.autocast("cuda", torch.bfloat16):
        assert model(inputs).dtype is torch.bfloat16
    torch.manual_seed(0)
    first, second = model(inputs)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(inputs), torch.stack([first, second]))
    with pytest.raises(UserError, match="unequal size there"):
        place(nn.Bilinear(2, 2, 1), DPConfig(), device).model(torch.ones(6, 2).cuda(), torch.ones(3, 2).cuda())
    norm = nn.BatchNorm1d(2)
    place(norm, DPConfig(replicas=2), device).model(torch.arange(12.0, device=device).reshape(6, 2))
    assert norm.running_mean is not None
    assert torch.allclose(norm.running_mean.cpu(), 0.1 * torch.tensor([2.0, 3.0]))

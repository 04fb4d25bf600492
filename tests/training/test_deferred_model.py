"""Models that are built on the meta device: which ones can be, and why others can't."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from command_line import TINY, Ended
from torch import Tensor, nn

from distaccum import UserError
from distaccum.config import FSDPConfig
from distaccum.training.deferred_model import DeferredModel
from distaccum.training.recording import Recording, recorded

CPU = torch.device("cpu")

TENSORS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(5, 7) * 0.3,
    "overwritten": lambda: nn.init.xavier_uniform_(nn.Linear(17, 33).weight),
    "overwritten in part": lambda: nn.Embedding(9, 5, padding_idx=2).weight,
    "orthogonal": lambda: nn.init.orthogonal_(torch.empty(5, 6)),
    "sparse": lambda: nn.init.sparse_(torch.empty(8, 9), 0.3),
    "permuted": lambda: torch.rand(4)[torch.randperm(4)],
    "of probabilities": lambda: torch.bernoulli(torch.rand(4, 4)),
    "transposed": lambda: torch.empty(3, 20).t_().normal_(),
    "values": lambda: torch.tensor([1.0, 2.0]) * torch.rand(2),
    "values of a kind": lambda: torch.empty(1).new_tensor([3, 4]),
    "numpy's": lambda: torch.empty(3).copy_(torch.from_numpy(np.arange(3.0))),
    "written by index": lambda: _written_by_index(),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)).parametrizations.weight[0]._u,
    "decided by values": lambda: torch.full((2,), torch.linspace(0, 1, 3)[1].item()),
    "listed": lambda: torch.tensor(torch.linspace(0, 1, 3).tolist()),
    "cast": lambda: torch.rand(3).to(torch.bfloat16),
}


def _written_by_index() -> Tensor:
    found = torch.zeros(4, 3)
    found[1] = 3.0
    found[2, 1] = -1
    found[0] = torch.tensor([1.0, 2.0, 3.0])
    return found


def _replayed(recording: Recording, tensor: Tensor) -> Tensor:
    found: list[Tensor] = []
    recording.replay([(recording.view_of(tensor), lambda whole: found.append(whole.clone()))])
    return found[0]


@pytest.mark.parametrize("name", TENSORS)
def test_a_replay_makes_the_same_numbers_and_leaves_the_generator_alike(name: str) -> None:
    torch.manual_seed(3)
    wanted = TENSORS[name]().detach()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with recorded() as recording:
        tensor = TENSORS[name]().detach()
    torch.manual_seed(4)
    found = _replayed(recording, tensor)
    assert torch.equal(found, wanted)
    assert (found.dtype, found.stride()) == (wanted.dtype, wanted.stride())
    assert torch.equal(torch.get_rng_state(), after)


def test_a_tensor_is_handed_out_before_the_next_one_is_made() -> None:
    with recorded() as recording:
        layers = [nn.Linear(2, 2) for _ in range(3)]
        for layer in reversed(layers):
            nn.init.normal_(layer.weight)
        with torch.no_grad():
            for layer in layers:
                layer.weight.mul_(0.5)
    said: list[int] = []
    recording.replay((recording.view_of(layer.weight), lambda _, i=i: said.append(i)) for i, layer in enumerate(layers))
    assert said == [2, 1, 0]  # in the order of the last random numbers, each finished before the next one is begun


class _Module(nn.Module):
    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.made = make()


def _of_a_seed() -> nn.Parameter:
    torch.manual_seed(1)
    return nn.Parameter(torch.rand(2))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Parameter(torch.rand(2) * float(torch.rand(1))), "it does depends on the values of random numbers"),
        (_of_a_seed, "it seeds torch's generator, or draws from it for a tensor on the CPU"),
        (lambda: nn.Parameter(torch.rand(2, device="cpu")), "it seeds torch's generator, or draws from it for"),
        (
            lambda: nn.Parameter(torch.empty(2).normal_(generator=torch.Generator())),
            "draws from a generator of its own",
        ),
        (lambda: torch.ones(2), "made is a tensor, but neither a parameter nor a buffer"),
        (lambda: [torch.ones(2)], "made is a tensor, but neither a parameter nor a buffer"),
        (lambda: torch.ones(2).numpy(), "numpy"),
        (lambda: torch.ones(2).to_sparse(), ""),
        (lambda: torch.ones(2).new([1.0]), "it calls Tensor.new"),
    ],
)
def test_what_cant_be_done_later_is_refused(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        DeferredModel(lambda: _Module(make))
    assert re.match(
        r"^model.init_on_meta=true: the model can't be built without memory, as .*" + reason, str(caught.value)
    )
    assert str(caught.value).endswith(". Set model.init_on_meta=false.")


def test_the_line_of_the_user_s_own_code_is_named() -> None:
    with pytest.raises(UserError, match=r"random numbers \(in test_deferred_model.py, line \d+\)\. Set"):
        DeferredModel(lambda: _Module(lambda: nn.Parameter(torch.ones(2) * torch.rand(1).item())))


def test_a_model_s_own_error_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        DeferredModel(lambda: _Module(lambda: 1 / 0))


def test_a_parameter_that_nothing_initialises_is_refused_unless_it_is_loaded() -> None:
    model = DeferredModel(lambda: _Module(lambda: nn.Parameter(torch.empty(2))))
    with pytest.raises(UserError, match=r"as made is made by torch.empty and never initialised\. Set"):
        model.initialise(model.module, CPU, FSDPConfig())
    model.initialise(model.module, CPU, FSDPConfig(), is_loaded=True)
    assert model.module.made.device == CPU


def test_other_strategies_are_refused(train: Callable[..., Ended]) -> None:
    assert train(*TINY, "run_dir=run", "strategy=single", "model.init_on_meta=true").message == (
        "model.init_on_meta=true needs strategy=fsdp: with strategy=single each rank holds the whole model anyway. Set "
        "model.init_on_meta=false."
    )

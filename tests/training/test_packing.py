"""The check before the first update, by which a model that does not keep packed samples apart is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distaccum.config import SingleConfig
from distaccum.config.enums import PrecisionName
from distaccum.errors import UserError
from distaccum.models import GPT
from distaccum.planning import CutSchedule, resolve_batch
from distaccum.runtime.devices import resolve_precision
from distaccum.strategies import place
from distaccum.tasks import LanguageModeling
from distaccum.training.packing import refuse_leaks

CPU = torch.device("cpu")


class Sequences(torch.utils.data.Dataset[Any]):
    lengths = (3, 20, 17, 5)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        drawn = torch.randint(0, 11, (self.lengths[index] + 1,))  # from the global generator, as augmentations do
        return drawn[:-1], drawn[1:]


class IgnoresBorders(GPT):
    def forward(self, tokens: Tensor, sample_lengths: Tensor | None = None) -> Tensor:
        return super().forward(tokens)


class PositionsGoOn(GPT):
    """Keeps attention inside samples, and counts positions over the whole row."""

    def forward(self, tokens: Tensor, sample_lengths: Tensor | None = None) -> Tensor:
        positions = torch.arange(tokens.shape[1])
        inside = super().forward(tokens, sample_lengths)
        return inside + self.position_embedding(positions) @ self.token_embedding.weight.T


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.GRU(8, 8, batch_first=True)
        self.out = nn.Linear(8, 11)

    def forward(self, tokens: Tensor, sample_lengths: Tensor | None = None) -> Tensor:
        return torch.as_tensor(self.out(self.layer(self.embedding(tokens))[0]))


class Alone(Recurrent):
    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens)


class TokenByToken(Recurrent):
    def forward(self, tokens: Tensor, sample_lengths: Tensor | None = None) -> Tensor:
        return torch.as_tensor(self.out(self.embedding(tokens)))


def gpt(kind: type[GPT] = GPT) -> GPT:
    return kind(vocab_size=11, max_length=20, num_layers=2, num_heads=2, width=8, dropout=0.1)


def check(model: nn.Module, precision: PrecisionName = PrecisionName.fp32, task: Any = None) -> None:
    data = Sequences()
    plan = resolve_batch(world_size=1, global_batch_size=4)
    cuts = CutSchedule(plan, 4, lengths=data.lengths, is_packed=True)
    strategy = place(model, SingleConfig(), CPU, precision)
    refuse_leaks(task or LanguageModeling(), data, cuts, strategy, resolve_precision(precision, CPU))


@pytest.mark.parametrize("precision", [PrecisionName.fp32, PrecisionName.bf16])
def test_a_model_that_keeps_samples_apart_is_left_as_it_was(precision: PrecisionName) -> None:
    torch.manual_seed(1)
    model = gpt()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    check(model, precision)
    assert torch.equal(torch.rand(1), wanted), "nothing is drawn from the global generator"
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    check(TokenByToken())


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        (IgnoresBorders, PrecisionName.fp32),
        (IgnoresBorders, PrecisionName.bf16),
        (PositionsGoOn, PrecisionName.fp32),  # a part of a leak, which 16 bits hide if it is small
    ],
)
def test_leaks_are_refused(kind: type[GPT], precision: PrecisionName) -> None:
    torch.manual_seed(1)
    with pytest.raises(UserError, match=r"the logits of two samples change by .* a sample is not kept apart"):
        check(gpt(kind), precision)


def test_a_leak_behind_a_layer_that_begins_with_zeros_is_refused() -> None:
    torch.manual_seed(1)
    model = gpt(IgnoresBorders)
    with torch.no_grad():
        model.position_embedding.weight.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("to_stream.weight"):
                parameter.zero_()
    with pytest.raises(UserError, match="change by"):
        check(model)
    assert not model.position_embedding.weight.any()


def test_models_and_tasks_that_cannot_be_packed() -> None:
    torch.manual_seed(1)
    with pytest.raises(UserError, match=r"change by .* recurrent, convolutional and state-space layers"):
        check(Recurrent())
    with pytest.raises(UserError, match=r"it can't compute packed samples \(TypeError: .*sample_lengths"):
        check(Alone())
    with pytest.raises(UserError, match="two samples together have the weight 2, and 1 when they are packed"):
        check(gpt(), task=LanguageModeling(normalize="sequences"))


def test_models_of_transformers() -> None:
    from packing import ForTransformers, from_transformers

    from distaccum.tasks import CausalLM

    data = ForTransformers()
    lengths = [len(tokens) for tokens, _ in data.samples]
    cuts = CutSchedule(resolve_batch(world_size=1, global_batch_size=4), len(data), lengths=lengths, is_packed=True)
    precision = resolve_precision(PrecisionName.fp64, CPU)
    for kind in ("llama", "gpt2"):
        strategy = place(from_transformers(kind), SingleConfig(), CPU, PrecisionName.fp64)
        refuse_leaks(CausalLM(), data, cuts, strategy, precision)

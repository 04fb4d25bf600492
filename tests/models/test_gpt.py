import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distaccum.config.components import GPTConfig
from distaccum.errors import UserError
from distaccum.models import GPT
from distaccum.training.model import build_model


def make(**changes: Any) -> GPT:
    torch.manual_seed(0)
    arguments = {"vocab_size": 11, "max_length": 24, "num_layers": 2, "num_heads": 2, "width": 16}
    return GPT(**{**arguments, **changes})


def make_sharp() -> GPT:
    """In double precision and with large weights, so that attention is far from uniform."""
    model = make().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def tokens(samples: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(11, (samples, length), generator=torch.Generator().manual_seed(seed))


def test_shapes() -> None:
    assert make()(tokens(3, 5)).shape == (3, 5, 11)
    assert make()(tokens(3, 24)).shape == (3, 24, 11)


@settings(deadline=None, max_examples=20)
@given(length=st.integers(1, 24), padding=st.integers(0, 23), neighbours=st.integers(0, 3))
def test_padding_and_neighbours_change_nothing(length: int, padding: int, neighbours: int) -> None:
    padding = min(padding, 24 - length)
    model = make_sharp()
    sample = tokens(1, length)
    padded = torch.cat([sample, torch.zeros(1, padding, dtype=torch.int64)], dim=1)
    batch = torch.cat([padded, tokens(neighbours, length + padding, seed=1)])
    assert torch.allclose(model(batch)[:1, :length], model(sample), rtol=0, atol=1e-12)


def test_the_future_is_not_seen_and_the_past_is() -> None:
    model = make_sharp()
    sample = tokens(1, 10)
    changed = sample.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 11
    before, after = model(sample), model(changed)
    assert torch.allclose(before[0, :6], after[0, :6], rtol=0, atol=1e-12)
    assert ((before - after)[0, 6:].abs().amax(dim=1) > 1e-3).all()


def test_positions_count() -> None:
    logits = make_sharp()(torch.full((1, 5), 3))
    assert (logits[0, 1:] - logits[0, :-1]).abs().amax(dim=1).min() > 1e-3


def test_the_output_layer_is_the_token_embedding() -> None:
    model = make()
    logits = model(tokens(2, 4))
    outputs = [name for name, parameter in model.named_parameters() if 11 in parameter.shape]
    assert outputs == ["token_embedding.weight"]
    expected = logits.detach() * 2
    features = model.norm.register_forward_hook(lambda module, inputs, output: output * 2)
    assert torch.allclose(model(tokens(2, 4)), expected)
    features.remove()


def test_initialisation() -> None:
    model = make(width=256, num_layers=8, vocab_size=300)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(16) if name.endswith("to_stream.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert parameter.unique().tolist() == ([0.0] if name.endswith("bias") else [1.0]), name
    loss = torch.nn.functional.cross_entropy(model(tokens(8, 24)).flatten(0, 1), tokens(8, 24, seed=1).flatten())
    assert loss.item() == pytest.approx(math.log(300), rel=0.02)


def test_dropout_is_off_in_evaluation() -> None:
    model = make(dropout=0.5)
    assert not torch.equal(model(tokens(1, 8)), model(tokens(1, 8)))
    model.eval()
    assert torch.equal(model(tokens(1, 8)), model(tokens(1, 8)))


def test_every_parameter_has_a_gradient() -> None:
    model = make()
    model(tokens(2, 24)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_the_configured_section_fits() -> None:
    model = build_model(GPTConfig(vocab_size=256, max_length=32), None)
    assert isinstance(model, GPT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 18, "num_heads": 4}, "width=18 cannot be divided among num_heads=4: 2 would be left"),
        ({"num_layers": 0}, "num_layers=0 is impossible"),
        ({"num_heads": 0}, "num_heads=0 is impossible"),
        ({"vocab_size": 0}, "vocab_size=0 is impossible"),
        ({"max_length": 0}, "max_length=0 is impossible"),
        ({"dropout": 1.0}, "dropout=1.0 must lie in"),
    ],
)
def test_impossible_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"GPT: {message}"):
        make(**change)


@pytest.mark.parametrize("shape", [(2, 25), (5,), (2, 3, 4)])
def test_tokens_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"GPT: tokens of shape .* at most model.max_length=24"):
        make()(torch.zeros(shape, dtype=torch.int64))

from __future__ import annotations

import pytest
import torch

from distaccum.config.components import EncoderConfig
from distaccum.errors import UserError
from distaccum.models import Encoder
from distaccum.training.model import build_model


def test_an_embedding_for_each_image() -> None:
    model = build_model(EncoderConfig(input_shape=[1, 8, 8], embedding_size=12), None)
    assert isinstance(model, Encoder)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 12)


def test_a_learned_temperature_is_the_embeddings_length() -> None:
    model = Encoder(input_shape=(1, 8, 8), learn_temperature=True, temperature=0.25)
    embeddings = model(torch.randn(3, 1, 8, 8))
    assert embeddings.norm(dim=1).tolist() == pytest.approx([2.0] * 3, rel=1e-5)
    assert len(list(model.parameters())) == len(list(Encoder(input_shape=(1, 8, 8)).parameters())) + 1


def test_impossible_arguments() -> None:
    with pytest.raises(UserError, match="temperature=0"):
        Encoder(input_shape=(1, 8, 8), temperature=0)
    with pytest.raises(UserError, match="embedding_size=0 is impossible"):
        Encoder(input_shape=(1, 8, 8), embedding_size=0)

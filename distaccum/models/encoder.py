"""An encoder of images, for contrastive learning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.errors import UserError
from distaccum.models.checks import require_at_least_one
from distaccum.models.cnn import CNN


class Encoder(nn.Module):
    """The CNN's stages, and a projection of two layers to the embedding.

    Args:
        input_shape: channels, height and width of one image.
        channels: of each stage, multiples of 8.
        width: units of the projection's hidden layer.
        embedding_size: size of an embedding.
        dropout: dropout before the projection.
        learn_temperature: makes the temperature a parameter. Embeddings have the length √(1 / temperature), so their
            inner products are cosine similarities divided by it.
        temperature: its initial value.

    Raises:
        UserError: an impossible argument.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        channels: Sequence[int] = (16, 32),
        width: int = 64,
        embedding_size: int = 32,
        dropout: float = 0.0,
        learn_temperature: bool = False,
        temperature: float = 0.2,
    ) -> None:
        super().__init__()
        require_at_least_one("Encoder", width=width, embedding_size=embedding_size)
        if not temperature > 0:
            raise UserError(f"Encoder: temperature={temperature} must be greater than 0.")
        self.trunk = CNN(input_shape=input_shape, num_classes=width, channels=channels, dropout=dropout)
        self.projection = nn.Sequential(nn.ReLU(), nn.Linear(width, embedding_size))
        # As in CLIP (Radford et al. 2021): the logarithm of the factor of the similarities.
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)])) if learn_temperature else None

    def forward(self, images: Tensor) -> Tensor:
        """Returns embeddings `[B, embedding_size]` of images `[B, *input_shape]`."""
        embeddings: Tensor = self.projection(self.trunk(images))
        if self.log_scale is None:
            return embeddings
        return F.normalize(embeddings, dim=1) * (self.log_scale / 2).exp()

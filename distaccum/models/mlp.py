"""Multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from distaccum.models.checks import require_at_least_one, require_probability, require_sample_shape


class MLP(nn.Module):
    """Linear layers with ReLU and dropout between them, on the flattened input.

    Args:
        input_shape: shape of one sample, any number of dimensions.
        num_classes: number of outputs.
        hidden_sizes: units of each hidden layer; none makes it a linear classifier.
        dropout: dropout after each hidden layer.

    Raises:
        UserError: an impossible argument.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        hidden_sizes: Sequence[int] = (256, 128),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least_one("MLP", input_shape=input_shape, num_classes=num_classes, hidden_sizes=hidden_sizes)
        require_probability("MLP", dropout=dropout)
        self.input_shape = tuple(input_shape)
        layers: list[nn.Module] = [nn.Flatten()]
        features = math.prod(self.input_shape)
        for size in hidden_sizes:
            layers += [nn.Linear(features, size), nn.ReLU(), nn.Dropout(dropout)]
            features = size
        self.layers = nn.Sequential(*layers, nn.Linear(features, num_classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns logits `[B, num_classes]` of inputs `[B, *input_shape]`."""
        require_sample_shape("MLP", self.input_shape, inputs.shape)
        logits: Tensor = self.layers(inputs)
        return logits

"""Reference models. Any `torch.nn.Module` can take their place (`model=custom`)."""

from distaccum.models.cnn import CNN
from distaccum.models.gpt import GPT
from distaccum.models.mlp import MLP

__all__ = ["CNN", "GPT", "MLP"]

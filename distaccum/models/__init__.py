"""Reference models. Any `torch.nn.Module` can take their place (`model=custom`)."""

from distaccum.models.cnn import CNN
from distaccum.models.encoder import Encoder
from distaccum.models.gpt import GPT, TiedHead
from distaccum.models.hugging_face import causal_lm
from distaccum.models.mlp import MLP
from distaccum.models.timm_model import timm_model
from distaccum.models.unet import UNet

__all__ = ["CNN", "GPT", "MLP", "Encoder", "TiedHead", "UNet", "causal_lm", "timm_model"]

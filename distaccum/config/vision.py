"""Typed sections of what there is for images: timm's models, and folders of images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distaccum.config import MISSING, DataConfig
from distaccum.config.components import ModelConfig
from distaccum.config.enums import Fit, OnDamaged


@dataclass(kw_only=True, slots=True)
class TimmConfig(ModelConfig):
    """Any model of timm (`pip install 'distaccum[vision]'`). Image size and channels are the data's."""

    _target_: str = "distaccum.models.timm_model"
    name: str = MISSING
    """Its name, as in `resnet18`, `vit_tiny_patch16_224.augreg_in21k_ft_in1k` or `local-dir:FOLDER`."""
    pretrained: bool = False
    """Begin with timm's weights, which it downloads."""
    pretrained_file: str | None = None
    """Begin with the weights of a file. Of another number of classes, all but the classifier is taken."""
    num_classes: int | None = None
    """Number of outputs. `null`: the dataset's."""
    in_chans: int | None = None
    """Channels of an image. `null`: the dataset's."""
    drop_rate: float = 0.0
    """Dropout before the classifier."""
    drop_path_rate: float = 0.0
    """Stochastic depth: probability of skipping a residual block, at the last one."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model's constructor, as in `+model.arguments.patch_size=8`."""


@dataclass(kw_only=True, slots=True)
class ImageDataConfig(DataConfig):
    """Images from files, as tensors of one size, augmented and mixed."""

    image_size: int = 64
    """Height and width that images are resized to."""
    fit: Fit = Fit.stretch
    """How an image becomes a square: `stretch` it, or `crop` the middle."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Subtracted from each channel."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Each channel is divided by this."""
    crop: list[float] | None = None
    """Train on random crops: their smallest and largest area as fractions of the image, as in `[0.35,1]`."""
    flip: float = 0.0
    """Train with random left-right flips of this probability."""
    colour: float = 0.0
    """Train with brightness, contrast and saturation changed by random factors between 1 - this and 1 + this."""
    randaugment: int = 0
    """Train with RandAugment of this magnitude, up to 30 (needs torchvision). 0: without."""
    mixup: float = 0.0
    """Train with mixup: each image is mixed with another one in a share from Beta(this, this). 0: without."""
    cutmix: float = 0.0
    """Train with CutMix: a box of each image comes from another one, its area from Beta(this, this). 0: without. With
    both, one of them by a fair coin."""
    mix_probability: float = 1.0
    """Fraction of the samples that are mixed, with `mixup` or `cutmix`."""


@dataclass(kw_only=True, slots=True)
class ImageFolderDataConfig(ImageDataConfig):
    """Images in one folder per class."""

    root: str = MISSING
    """Folder of class folders to train on."""
    evaluation_root: str | None = None
    """Folder of class folders to evaluate on. `null`: a part of `root` is held out."""
    evaluation_fraction: float = 0.1
    """Fraction of each class to hold out for evaluation when there is no `evaluation_root`."""
    on_damaged: OnDamaged = OnDamaged.stop
    """Images that can't be read: `stop` before training and name them, `skip` them and log which; all are read once for
    that, the result is kept. `late`: don't look beforehand, stop when one is loaded."""

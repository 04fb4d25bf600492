"""Typed sections of the built-in components, for `model`, `data` and `task`; those for `optim` are in `optimizers.py`.

Each names its class by `_target_` and lists the arguments that the class takes, so that an unknown key or a wrong type
is refused before torch is imported. `schemas.py` says which configuration group each belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distaccum.config import (
    DataConfig,
)
from distaccum.config.enums import Normalize


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Keys of every model, your own included, unless its constructor takes an argument of that name."""

    activation_checkpointing: bool = False
    """Keep only the inputs of each block, and compute the block again in the backward: less memory, more time, the same
    bits. Blocks are the units that FSDP shards (`strategy.wrap`; else the members of each `ModuleList`, or the model's
    children if it has none)."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of the names of parameters to freeze, as in `[token_embedding.*,blocks.0.*]`. Frozen parameters have no
    gradient and no optimizer state, and are not sent."""
    init_from: str | None = None
    """Begin with the weights of a safetensors file, of several with an index (`model.safetensors.index.json`), or of a
    finished run's folder; names and shapes must be the model's. Updates, optimizer and schedule begin anew; `resume`
    restores those too."""
    init_on_meta: bool = False
    """With `strategy=fsdp`: build the model without memory, shard it, and initialise it shard by shard, so that no rank
    ever holds all of it. The same numbers."""
    unfreeze: Any = None  # a dict[int, list[str]], which OmegaConf can't replace as a whole where it is typed
    """Patterns of the names of parameters by update, as in `{100:[blocks.1.*],200:[blocks.*]}`: frozen from the run's
    start, and trained from that update on (counted from 1, as in the log)."""


@dataclass(kw_only=True, slots=True)
class MLPConfig(ModelConfig):
    """Multi-layer perceptron with ReLU, on the flattened input."""

    _target_: str = "distaccum.models.MLP"
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 128])
    """Units of each hidden layer."""
    dropout: float = 0.0
    """Dropout after each hidden layer."""
    input_shape: list[int] | None = None
    """Shape of one sample. `null`: the dataset's."""
    num_classes: int | None = None
    """Number of outputs. `null`: the dataset's."""


@dataclass(kw_only=True, slots=True)
class CNNConfig(ModelConfig):
    """Convolutional network: one 3×3 convolution with GroupNorm per stage, halving the image between stages;
    then the mean of each quarter of the image."""

    _target_: str = "distaccum.models.CNN"
    channels: list[int] = field(default_factory=lambda: [32, 64])
    """Channels of each stage (multiples of 8)."""
    dropout: float = 0.0
    """Dropout before the classifier."""
    input_shape: list[int] | None = None
    """Channels, height and width of one sample. `null`: the dataset's."""
    num_classes: int | None = None
    """Number of outputs. `null`: the dataset's."""


@dataclass(kw_only=True, slots=True)
class GPTConfig(ModelConfig):
    """Decoder-only transformer (pre-norm, learned positions, tied embeddings)."""

    _target_: str = "distaccum.models.GPT"
    num_layers: int = 2
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads per block."""
    width: int = 96
    """Width of the residual stream."""
    dropout: float = 0.0
    """Dropout in attention and on the residual stream."""
    vocab_size: int | None = None
    """Number of different tokens. `null`: the dataset's."""
    max_length: int | None = None
    """Longest sequence in tokens. `null`: the dataset's."""


@dataclass(kw_only=True, slots=True)
class UNetConfig(ModelConfig):
    """U-Net with GroupNorm: down and up again, with skip connections between the stages of one size."""

    _target_: str = "distaccum.models.UNet"
    channels: list[int] = field(default_factory=lambda: [16, 32, 64])
    """Channels of each stage from the top down (multiples of 8)."""
    input_shape: list[int] | None = None
    """Channels, height and width of one image. `null`: the dataset's."""
    num_classes: int | None = None
    """Classes of a pixel. `null`: the dataset's."""


@dataclass(kw_only=True, slots=True)
class EncoderConfig(ModelConfig):
    """The CNN's stages and a projection to an embedding, for contrastive learning."""

    _target_: str = "distaccum.models.Encoder"
    channels: list[int] = field(default_factory=lambda: [16, 32])
    """Channels of each stage (multiples of 8)."""
    width: int = 64
    """Units of the projection's hidden layer."""
    embedding_size: int = 32
    """Size of an embedding."""
    dropout: float = 0.0
    """Dropout before the projection."""
    learn_temperature: bool = False
    """Learn the temperature: embeddings have the length √(1 / temperature). Set `task.temperature=null` with it."""
    temperature: float = 0.2
    """Initial value of a learned temperature."""
    input_shape: list[int] | None = None
    """Channels, height and width of one image. `null`: the dataset's."""


@dataclass(kw_only=True, slots=True)
class ClassificationConfig:
    """Cross-entropy over classes; weight: samples; metric: accuracy."""

    _target_: str = "distaccum.tasks.Classification"
    label_smoothing: float = 0.0
    """Probability mass spread over all classes."""
    class_weights: list[float] | None = None
    """What each class counts in the loss, as in `[1,5]`; the window's loss is divided by Σ over the weights of its
    targets, as by torch's `CrossEntropyLoss(weight=…)` over the whole window."""


@dataclass(kw_only=True, slots=True)
class LanguageModelingConfig:
    """Cross-entropy over the next token; weight: valid tokens, or as `normalize` says; metric: accuracy of tokens."""

    _target_: str = "distaccum.tasks.LanguageModeling"
    normalize: Normalize = Normalize.tokens
    """Mean over the window's `tokens` (each token counts alike, so long samples count more), over its `sequences` (each
    sample's mean over its own tokens counts alike), or over its `samples` (the sum over a sample's tokens, the negative
    log-likelihood of the whole sample, divided by the number of samples)."""
    chunked_loss: bool = False
    """Compute logits, loss and gradients of some tokens at a time: logits of a large vocabulary never exist whole. For
    models whose `get_output_embeddings()` returns their last layer; not for `strategy=dp`."""


@dataclass(kw_only=True, slots=True)
class SegmentationConfig:
    """Cross-entropy over the class of each pixel; weight: valid pixels; metrics: accuracy and mean IoU."""

    _target_: str = "distaccum.tasks.Segmentation"
    ignore_index: int = 255
    """Target of pixels that neither loss nor metrics count."""
    class_weights: list[float] | None = None
    """What each class counts in the loss, as for `task=classification`."""


@dataclass(kw_only=True, slots=True)
class DiceConfig:
    """Soft Dice over all pixels of the window, a mean over classes, exact for any cut in one more forward; weight:
    samples; metrics: accuracy and mean IoU. `alpha=1 beta=1` is the soft IoU, others are Tversky indices."""

    _target_: str = "distaccum.tasks.Dice"
    alpha: float = 0.5
    """Weight of false positives."""
    beta: float = 0.5
    """Weight of false negatives."""
    cross_entropy: float = 0.0
    """Coefficient of the mean cross-entropy over the window's pixels, which is added."""
    smooth: float = 1e-5
    """Added to numerator and denominator, for classes that are nowhere."""
    ignore_index: int = 255
    """Target of pixels that neither loss nor metrics count."""


@dataclass(kw_only=True, slots=True)
class ContrastiveConfig:
    """NT-Xent (SimCLR) over all samples of the window, exact for any cut by gradient caching; weight: views; metrics:
    retrieval of the other view, and whether the nearest other sample has the same label."""

    _target_: str = "distaccum.tasks.Contrastive"
    temperature: float | None = 0.2
    """Divides the cosine similarities. `null`: plain inner products of the embeddings."""
    evaluation_samples: int | None = 256
    """Samples of an evaluation that are contrasted with each other at a time. `null`: all of them."""


@dataclass(kw_only=True, slots=True)
class CoinsDataConfig(DataConfig):
    """Patches of scikit-image's photograph of coins, with the class of each pixel; a third of it is held out."""

    patch_size: int = 64
    """Height and width of a patch."""


@dataclass(kw_only=True, slots=True)
class TextDataConfig(DataConfig):
    """Paragraphs of the documentation in Python's standard library, with bytes as tokens."""

    max_length: int = 128
    """Longest sequence in bytes; longer paragraphs are cut into several samples."""


@dataclass(kw_only=True, slots=True)
class SyntheticDataConfig(DataConfig):
    """Random samples around one centre per class, of any number and shape, for measurements."""

    num_samples: int = 4096
    """Samples to train on; a quarter as many to evaluate on."""
    input_shape: list[int] = field(default_factory=lambda: [3, 32, 32])
    """Shape of one sample."""
    num_classes: int = 10
    """Number of classes."""

"""Models, tasks and data for the check: healthy ones, and ones with a fault planted in them."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.data import Dataset

from distaccum import LossTerm, TaskOutput, tasks
from distaccum.models import GPT
from distaccum.tasks import Classification, LanguageModeling

CLASSES = 3
FEATURES = 6
VOCABULARY = 11


class Points(Dataset[tuple[Tensor, int]]):
    """Vectors and their classes."""

    def __init__(self, num_samples: int = 40) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(num_samples, FEATURES, generator=generator)
        self.y = torch.randint(0, CLASSES, (num_samples,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.y[index]


class AugmentedPoints(Points):
    """Fault: another sample each time."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(FEATURES), y


class PythonAugmentedPoints(Points):
    """Fault: another sample each time, by a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(3)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(index)
        return x * self.random.uniform(0.9, 1.1), y


class PointsWithNan(Points):
    """Fault: one value is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.x[:, 2][::3] = torch.nan


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Ragged sequences with next-token targets."""

    vocab_size = VOCABULARY
    max_length = 12

    def __init__(self, num_samples: int = 40) -> None:
        generator = torch.Generator().manual_seed(3)
        self.samples = []
        for _ in range(num_samples):
            tokens = torch.randint(
                1, VOCABULARY, (int(torch.randint(2, 13, (), generator=generator)),), generator=generator
            )
            self.samples.append((tokens, (tokens * 3 + 1) % VOCABULARY))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]

    @staticmethod
    def collate_fn(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        inputs, targets = zip(*samples, strict=True)
        pad = nn.utils.rnn.pad_sequence
        return pad(list(inputs), batch_first=True), pad(list(targets), batch_first=True, padding_value=-100)


class Standardise:
    """Fault: a collate that normalises with the micro-batch's own statistics."""

    def __call__(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        x = torch.stack([sample[0] for sample in samples])
        return (x - x.mean(0)) / (x.std(0, correction=0) + 0.1), torch.tensor([sample[1] for sample in samples])


class Mixup:
    """Fault: a collate that adds another sample of the micro-batch to each."""

    def __init__(self, own_generator: bool = False) -> None:
        self.draw: Any = np.random.default_rng() if own_generator else np.random

    def __call__(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        x = torch.stack([sample[0] for sample in samples])
        y = F.one_hot(torch.tensor([sample[1] for sample in samples]), CLASSES).to(x.dtype)
        share, other = float(self.draw.beta(0.4, 0.4)), torch.from_numpy(self.draw.permutation(len(x)))
        return share * x + (1 - share) * x[other], share * y + (1 - share) * y[other]


class NoisyCollate:
    """Fault: noise that follows the micro-batch's seed, though no sample sees another."""

    def __call__(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        x = torch.stack([sample[0] for sample in samples])
        return x + 0.1 * torch.randn(x.shape), torch.tensor([sample[1] for sample in samples])


def layers(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), *middle, nn.Tanh(), nn.Linear(8, CLASSES))


class Plain(nn.Module):
    """Healthy."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(nn.LayerNorm(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


# --- faults of models ---


class WithBatchNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(nn.BatchNorm1d(8))


class Centred(nn.Module):
    """A layer of one's own that takes the mean over the samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class WithCentring(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(Centred())


class MixesInForward(Plain):
    """No layer does it, the model's own forward does."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.layers(x)
        return logits - 0.5 * logits.softmax(dim=0)


class AttendsOverSamples(nn.Module):
    """Attention with batch_first=False on `[samples, length, width]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.out = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.out(x + self.attention(x, x, x, need_weights=False)[0])


class RecursOverSamples(nn.Module):
    """A recurrence with batch_first=False on `[samples, length, width]`: each sample sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.rnn = nn.LSTM(8, 8)
        self.out = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.rnn(self.embedding(tokens))[0])


class Encoder(nn.Module):
    """A transformer encoder that looks at the padding, unless it is told where that is."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.embedding = nn.Embedding(VOCABULARY, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens == 0 if self.masked else None
        return self.out(self.encoder(self.embedding(tokens), src_key_padding_mask=mask))


class MixesUp(Plain):
    """Adds another sample of the micro-batch to each."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + 0.3 * x[torch.randperm(len(x))])


class SpectralNorm(Plain):
    """A step of power iteration in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))


class NanForSome(Plain):
    """Divides by zero for samples that the measured windows may not hold."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (x[:, :1] > -1.0).to(x.dtype)


class MeanPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=1, keepdim=True)


class PoolsOverPadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.pool = MeanPool()
        self.out = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.pool(self.embedding(tokens))))


class RunningScale(nn.Module):
    """Divides by a running scale that each forward updates."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.mul_(0.9).add_(0.1 * x.detach().abs().mean())
        return x / self.scale.clone()


class WithRunningScale(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(RunningScale())


class Counts(Plain):
    """A count that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return super().forward(x)


class WarmsUp(Plain):
    """A count in a Python attribute, on which the output depends."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return super().forward(x) * min(1.0, self.forwards / 100)


class _WrongSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * x  # forgets the 2


class WrongBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_WrongSquare.apply(self.first(x)))


class Detached(nn.Module):
    """The first layer's gradient is cut off, though it decides the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)).detach())


class WrongBackwardInFloat32(WrongBackward):
    """The same, behind casts and a kink."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RootMeanSquareNorm()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(_WrongSquare.apply(self.norm(self.first(x)).float()).to(x.dtype) - 0.5))


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)


class LogOfNegatives(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(Log())


class InfiniteSlope(nn.Module):
    """The loss is finite, and its gradient is not: the slope of the root at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros = nn.Parameter(torch.zeros(CLASSES))
        self.layers = layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.zeros.abs().sqrt()


class Unseeded(Plain):
    """Noise from the system's own generator, which no seed reaches."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.SystemRandom().uniform(0.5, 1.5)


class EvalModeIsLost(Plain):
    """BatchNorm frozen at construction only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(nn.BatchNorm1d(8).eval())


# --- healthy models ---


class FrozenBatchNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(nn.BatchNorm1d(8))
        self.train()

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        super().train(mode)
        self.layers[1].eval()
        return self


class Shared(nn.Module):
    """One layer used twice, and an output layer tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layer(torch.tanh(self.layer(self.embedding(tokens))))
        return F.linear(x, self.embedding.weight)


class Gated(nn.Module):
    """Two experts; each sample is sent to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)])

    def forward(self, x: Tensor) -> Tensor:
        found = x.new_zeros(len(x), CLASSES)
        for number, expert in enumerate(self.experts):
            rows = ((x[:, 0] > 0).long() == number).nonzero().squeeze(1)
            if len(rows):
                found = found.index_add(0, rows, expert(x[rows]))
        return found


class PartlyUnused(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.never_called = nn.Linear(3, 3)


class Drops(Plain):
    """Dropout as a module, as a function, and inside attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(nn.Dropout(0.3))
        self.attention = nn.MultiheadAttention(FEATURES, 2, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        parts = x[:, None, :] * torch.linspace(0.5, 1.5, 4, dtype=x.dtype, device=x.device)[None, :, None]
        x = self.attention(parts, parts, parts, need_weights=False)[0].mean(dim=1)
        return self.layers(F.dropout(x, 0.1, self.training))


class Checkpointed(Plain):
    """Computes its forward again in the backward, dropout included."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=False)


class TimeFirst(RecursOverSamples):
    """The same recurrence, with its inputs transposed as they should be."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.rnn(self.embedding(tokens).transpose(0, 1))[0].transpose(0, 1))


class AddsNoise(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class ReturnsAnObject(Plain):
    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.layers(x))


class Images(nn.Module):
    """Convolution, GroupNorm and in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.LazyLinear(CLASSES),
        )
        self.layers(torch.zeros(1, 1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(-1, 1, 2, 3))


class Recurrent(nn.Module):
    """Packed sequences: padding is never looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.out = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != 0).sum(dim=1)
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(tokens), lengths, True, enforce_sorted=False)
        outputs, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], True, total_length=tokens.shape[1])
        return self.out(outputs)


class PackableGPT(GPT):
    """Small, and with positions for a whole row of samples that are packed."""

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCABULARY, max_length=256, num_layers=2, num_heads=2, width=8)


class AttendsAcross(PackableGPT):
    """Fault: positions begin anew with each packed sample, and attention looks beyond it."""

    def forward(self, tokens: Tensor, sample_lengths: Tensor | None = None) -> Tensor:
        lengths = [tokens.shape[1]] if sample_lengths is None else sample_lengths.tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])
        stream = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            stream = block(stream)
        return torch.as_tensor(self.head(self.norm(stream), self.token_embedding.weight))


class PositionsGoOn(PackableGPT):
    """Fault: attention stays inside samples, and positions don't begin anew, in a part that is too small to notice in
    float32."""

    def forward(self, tokens: Tensor, sample_lengths: Tensor | None = None) -> Tensor:
        positions = self.position_embedding(torch.arange(tokens.shape[1]))
        return super().forward(tokens, sample_lengths) + 1e-6 * positions @ self.token_embedding.weight.T


class RootMeanSquareNorm(nn.Module):
    """As in language models: in float32, and then back to the format of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class NormsInFloat32(nn.Module):
    """The norms, a softmax and the logits are cast, as in language models, and computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.norms = nn.ModuleList(RootMeanSquareNorm() for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self._forward, tokens, use_reentrant=False)

    def _forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + F.silu(linear(norm(x))) * F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)
        return self.out(x).float()


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 else nn.Identity()
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(y + self.norms[2](self.shortcut(x)))


class ResNet(nn.Module):
    """A small residual network. The BatchNorm of its last layers sees two values a channel, and is steep."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        sizes = [(1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8)]
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.MaxPool2d(3, 2, 1),
            *(Residual(i * width, o * width, o // i) for i, o in sizes),
        )
        self.out = nn.Linear(8 * width, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x).mean((2, 3)))


class Pictures(Points):
    def __init__(self) -> None:
        super().__init__()
        self.x = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class InFloat32(Plain):
    """Computes in float32 whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.empty(logits.shape).copy_(logits)


# --- tasks ---


class MeanLoss(Classification):
    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        output = super().__call__(model, batch)
        return TaskOutput(output.loss_sum / output.weight, output.weight)


class MeanLossWeightOne(Classification):
    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        output = super().__call__(model, batch)
        return TaskOutput(output.loss_sum / output.weight, 1.0)


class TokenMean(LanguageModeling):
    """The mean over the micro-batch's tokens, times the number of samples."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        output = super().__call__(model, batch)
        return TaskOutput(output.loss_sum / output.weight * len(batch[0]), len(batch[0]))


class Contrastive:
    """Each sample against all others of the micro-batch."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        inputs, _ = batch
        found = F.normalize(model(inputs), dim=1)
        other = F.normalize(inputs[:, :CLASSES], dim=1)
        return TaskOutput(F.cross_entropy(found @ other.T, torch.arange(len(found)), reduction="sum"), len(found))


class BatchRatio:
    """A ratio of two sums over the micro-batch (Dice)."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        inputs, targets = batch
        found = model(inputs).softmax(dim=1)
        wanted = F.one_hot(targets, CLASSES)
        ratio = 1 - 2 * (found * wanted).sum() / (found.square().sum() + wanted.sum())
        return TaskOutput(ratio * len(inputs), len(inputs))


class WithPenalty(Classification):
    """A penalty on the parameters, added once per micro-batch."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        output = super().__call__(model, batch)
        penalty = sum(parameter.square().sum() for parameter in model.parameters())
        return TaskOutput(output.loss_sum + 0.1 * penalty, output.weight)


class CountsPadding(LanguageModeling):
    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        return TaskOutput(super().__call__(model, batch).loss_sum, batch[1].numel())


class ConstantWeight(Classification):
    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        return TaskOutput(super().__call__(model, batch).loss_sum, 1.0)


class LossInFloat32:
    """Casts what the model gives, as most training scripts do."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        inputs, targets = batch
        return TaskOutput(F.cross_entropy(model(inputs).float(), targets, reduction="sum"), len(targets))


class InsistsOnFloat32(LossInFloat32):
    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        output = super().__call__(model, batch)
        assert output.loss_sum.dtype == torch.float32
        return output


class CouplesBarely(Classification):
    """Fault: adds a term that is not the same for parts and whole, and hardly there."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        output = super().__call__(model, batch)
        return TaskOutput(output.loss_sum + 3e-7 * model(batch[0]).sum() ** 2, output.weight)


class BatchRatioInFloat32:
    """Fault: a ratio of two sums over the micro-batch, in float32."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        return BatchRatio()(lambda inputs: model(inputs).float(), batch)  # type: ignore[arg-type]


class SoftTargets:
    """Healthy: targets are probabilities."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        inputs, targets = batch
        return TaskOutput(-(model(inputs).log_softmax(1) * targets).sum(), len(inputs))


class NoWeight(Classification):
    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        return TaskOutput(super().__call__(model, batch).loss_sum, 0.0)


class NoTask:
    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]).sum()


class OfAnObject:
    """Reads the logits of an object, weighs the classes, and divides by the sum of those weights: healthy."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        inputs, targets = batch
        logits = model(inputs).logits
        weights = torch.tensor([1.0, 2.0, 3.0], dtype=logits.dtype)[targets]
        return TaskOutput((F.cross_entropy(logits, targets, reduction="none") * weights).sum(), weights.sum())


class ClassWeightedMean(Classification):
    """A weighted mean, times the number of samples."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        inputs, targets = batch
        logits = model(inputs)
        weights = torch.tensor([1.0, 2.0, 3.0], dtype=logits.dtype)
        return TaskOutput(F.cross_entropy(logits, targets, weight=weights) * len(logits), len(logits))


class Squeezes(Classification):
    """A micro-batch of one loses its first dimension, and another formula is used."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        inputs, targets = batch
        errors = model(inputs).squeeze() - F.one_hot(targets, CLASSES).squeeze()
        return TaskOutput((errors**2).sum() if errors.ndim == 2 else errors.abs().sum(), len(targets))


class WithTerm:
    """A further loss of the samples whose first feature is positive, right in all."""

    def weights(self, batch: Any) -> dict[str, Any]:
        return {"main": len(batch[0]), "positive": self._positive(batch[0]).sum()}

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        inputs, targets = batch
        logits = model(inputs)
        chosen = logits[self._positive(inputs)]
        loss_sum = F.cross_entropy(logits, targets, reduction="sum")
        return TaskOutput(loss_sum, len(targets), terms={"positive": self._term(chosen)})

    def _positive(self, inputs: Tensor) -> Tensor:
        return inputs[:, 0] > 0

    def _term(self, chosen: Tensor) -> LossTerm:
        return LossTerm(chosen.square().sum(), len(chosen), coefficient=0.3)


class TermIsAMean(WithTerm):
    def _term(self, chosen: Tensor) -> LossTerm:
        return LossTerm(chosen.square().mean(1).mean() if len(chosen) else chosen.sum(), len(chosen))


class TermPerMicroBatch(WithTerm):
    """Each micro-batch's mean counts alike, whatever its size."""

    def weights(self, batch: Any) -> dict[str, Any]:
        return {"main": len(batch[0]), "positive": 1}

    def _term(self, chosen: Tensor) -> LossTerm:
        return LossTerm(chosen.square().sum(), 1)


class TermOfAnotherUnit(WithTerm):
    """Samples are counted beforehand, and numbers afterwards."""

    def _term(self, chosen: Tensor) -> LossTerm:
        return LossTerm(chosen.square().sum(), chosen.numel())


class CoupledBatchNorm(nn.Module):
    """Embeds digits' views, and mixes them in a BatchNorm."""

    def __init__(self, input_shape: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class PlainContrastive:
    """The loss of each micro-batch by itself."""

    def __init__(self) -> None:
        self._task = tasks.Contrastive()

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        return self._task(model, batch)

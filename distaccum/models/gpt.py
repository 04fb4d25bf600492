"""Decoder-only transformer."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.errors import UserError
from distaccum.models.attention import Samples, causal_attention
from distaccum.models.checks import require_at_least_one, require_probability

INITIAL_STD = 0.02
"""Standard deviation of the initial weights, as in GPT-2."""


class GPT(nn.Module):
    """Pre-norm transformer with learned positions, whose output layer is the token embedding itself.

    Attention is causal: padding at the end of a sequence changes nothing before it, so a padded micro-batch needs no
    mask. Samples may be packed too, put end to end in one row without padding: attention then stays inside each.
    Initialised as GPT-2 was (Radford et al. 2019): normal weights of std 0.02, those that write into the residual
    stream divided by sqrt(2 * num_layers), the number of its summands.

    Args:
        vocab_size: number of different tokens.
        max_length: longest sequence in tokens.
        num_layers: transformer blocks.
        num_heads: attention heads per block; a divisor of `width`.
        width: size of the residual stream.
        dropout: dropout of the embeddings, the attention weights and what each half block adds.

    Raises:
        UserError: an impossible argument.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_length: int,
        num_layers: int = 4,
        num_heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least_one("GPT", vocab_size=vocab_size, max_length=max_length)
        require_at_least_one("GPT", num_layers=num_layers, num_heads=num_heads, width=width)
        require_probability("GPT", dropout=dropout)
        if width % num_heads:
            raise UserError(
                f"GPT: width={width} cannot be divided among num_heads={num_heads}: {width % num_heads} would be left "
                "over. Change model.width or model.num_heads."
            )
        self.max_length = max_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(max_length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = TiedHead()
        self._initialise(residual_std=INITIAL_STD / math.sqrt(2 * num_layers))

    def forward(self, tokens: Tensor, sample_lengths: Tensor | None = None) -> Tensor:
        """Returns logits `[B, T, vocab_size]` of tokens, integers `[B, T]`: at each place those of the next token.

        Args:
            sample_lengths: of samples that are put end to end in the one row of `tokens`, `[1, Σ lengths]`.

        Raises:
            UserError: tokens of another number of dimensions or no integers, or T above `max_length`.
        """
        if tokens.is_floating_point() or tokens.is_complex():
            raise UserError(f"GPT: tokens must be integers, and they are {tokens.dtype}. Mend the dataset.")
        samples = None
        if sample_lengths is not None:
            samples = Samples(sample_lengths, tokens.shape[1], self.max_length)
        elif tokens.dim() != 2 or tokens.shape[1] > self.max_length:
            raise UserError(
                f"GPT: tokens of shape {list(tokens.shape)} do not fit: the shape must be [samples, length], with a "
                f"length of at most model.max_length={self.max_length}."
            )
        positions = torch.arange(tokens.shape[1], device=tokens.device) if samples is None else samples.positions
        stream: Tensor = self.dropout(self.token_embedding(tokens.long()) + self.position_embedding(positions))
        for block in self.blocks:
            stream = block(stream, samples)
        logits: Tensor = self.head(self.norm(stream), self.token_embedding.weight)
        return logits

    def get_output_embeddings(self) -> TiedHead:
        """Returns the layer that computes logits, as models of transformers do."""
        return self.head

    def _initialise(self, residual_std: float) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=residual_std if name.endswith("to_stream.weight") else INITIAL_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


class TiedHead(nn.Module):
    """A linear output layer whose weight is another module's, and given in each call."""

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Returns logits `[..., V]` of inputs `[..., width]`, with a weight `[V, width]`."""
        return F.linear(hidden, weight)


class _Block(nn.Module):
    """Adds attention, then a two-layer perceptron, to the residual stream `[B, T, width]`."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, num_heads, dropout)
        self.perceptron_norm = nn.LayerNorm(width)
        layers = OrderedDict[str, nn.Module](
            to_hidden=nn.Linear(width, 4 * width), activation=nn.GELU(), to_stream=nn.Linear(4 * width, width)
        )
        self.perceptron = nn.Sequential(layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, stream: Tensor, samples: Samples | None = None) -> Tensor:
        stream = stream + self.dropout(self.attention(self.attention_norm(stream), samples))
        update: Tensor = self.dropout(self.perceptron(self.perceptron_norm(stream)))
        return stream + update


class _Attention(nn.Module):
    """Causal self-attention of several heads."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.to_query_key_value = nn.Linear(width, 3 * width)
        self.to_stream = nn.Linear(width, width)

    def forward(self, inputs: Tensor, samples: Samples | None = None) -> Tensor:
        batch, length, width = inputs.shape
        heads = self.to_query_key_value(inputs).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [B, heads, T, width / heads]
        mixed = causal_attention(query, key, value, samples, dropout=self.dropout if self.training else 0.0)
        outputs: Tensor = self.to_stream(mixed.transpose(1, 2).reshape(batch, length, width))
        return outputs

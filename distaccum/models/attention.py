"""Causal attention, of rows that are one sample each or of several samples that are put end to end in one row."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distaccum.errors import UserError, listed

varlen_attn: Any = None
if torch.version.cuda or torch.version.hip:  # for CPUs there is none, and the import takes a second
    with suppress(ImportError):  # torch below 2.10
        from torch.nn.attention.varlen import varlen_attn


class Samples:
    """Samples that are put end to end in one row.

    Args:
        lengths: integers `[samples]`, each at least 1.
        total: tokens of the row, which is the sum of them.
        longest: most tokens of a sample.

    Attributes:
        positions: of each token in its sample, from 0, `[total]`.
        ends: where samples begin and the last one ends, int32 `[samples + 1]`.
        longest: as given.
        sizes: the lengths as numbers, where they are on the host.

    Raises:
        UserError: the lengths don't add up to the total, or one is above `longest`. On a CPU alone: reading numbers
            from another device would make the host wait for it.
    """

    def __init__(self, lengths: Tensor, total: int, longest: int) -> None:
        self.longest = longest
        self.sizes: list[int] | None = None
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            self.sizes = lengths.tolist()
            if sum(self.sizes) != total or max(self.sizes, default=0) > longest:
                raise UserError(
                    f"packed samples of {listed(self.sizes, 8)} tokens do not fit: they must fill the row of {total} "
                    f"that they are packed into, and have at most model.max_length={longest} each."
                )
        self.ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        numbers = torch.arange(len(lengths), device=lengths.device)
        # With the size given, the host need not ask the device for it.
        self._owners = numbers.repeat_interleave(lengths, output_size=total)
        self.positions = torch.arange(total, device=lengths.device) - self.ends[self._owners]
        self._mask: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Returns which tokens (columns) each token (rows) sees: those before it in its sample. `[total, total]`."""
        if self._mask is None:
            self._mask = (self._owners[:, None] == self._owners).tril()
        return self._mask


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, samples: Samples | None = None, *, dropout: float = 0.0
) -> Tensor:
    """Returns what each token takes from itself and from those before it in its sample.

    All three tensors and the result are `[B, heads, T, width]`.

    Args:
        samples: of the one row, if it is packed.
        dropout: probability that an attention weight is dropped.
    """
    attend = F.scaled_dot_product_attention
    if samples is None:
        return attend(query, key, value, dropout_p=dropout, is_causal=True)
    if samples.sizes is not None:
        # One after the other: no token is compared with those of other samples, as a mask of the whole row would do.
        parts = zip(*(torch.split(tensor, samples.sizes, dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat([attend(q, k, v, dropout_p=dropout, is_causal=True) for q, k, v in parts], dim=2)
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if varlen_attn is not None and query.is_cuda and is_half and not dropout:
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # [T, heads, width]
        ends, longest = samples.ends, samples.longest
        mixed: Any = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0))
        return mixed.transpose(0, 1).unsqueeze(0)  # type: ignore[no-any-return]
    return attend(query, key, value, attn_mask=samples.mask, dropout_p=dropout)

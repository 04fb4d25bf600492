"""Packing: the samples of a micro-batch are put end to end, without padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distaccum.errors import UserError
from distaccum.loaders.collate import PadCollate
from distaccum.runtime.nested import leaves, mapped


class PackCollate:
    """Makes a micro-batch of one row of samples that are sequences, put end to end, and says where each begins.

    A sample is a tuple `(tokens, targets)` or a mapping, of tensors, arrays or lists of one length in their first
    dimension: with lengths `T_i`, shapes `[T_i, ...]` become `[1, Σ T_i, ...]`. What is added tells the model where
    samples begin, so that it can keep attention inside each of them:

    - Of tuples comes `({"tokens": …, "sample_lengths": …}, targets)`, for a model with `forward(tokens,
      sample_lengths)`, as `distaccum.models.GPT` is one. `sample_lengths` are the `T_i`, int64 `[samples]`.
    - Of mappings comes a mapping with `position_ids`, int64 `[1, Σ T_i]`, which count from 0 in each sample. From
      these, causal models of `transformers` know where samples begin, if they get no `attention_mask`.

        >>> pack = PackCollate()
        >>> pack([(torch.tensor([5, 6]), torch.tensor([6, 7])), (torch.tensor([8]), torch.tensor([9]))])
        ({'tokens': tensor([[5, 6, 8]]), 'sample_lengths': tensor([2, 1])}, tensor([[6, 7, 9]]))

    Args:
        tokens: name of the model's argument that the first field of a tuple is.
        sample_lengths, position_ids: names under which these are added; None: they aren't. Default: as above.
    """

    def __init__(
        self, *, tokens: str = "tokens", sample_lengths: str | None = None, position_ids: str | None = None
    ) -> None:
        self.tokens = tokens
        self.sample_lengths = sample_lengths
        self.position_ids = position_ids
        self._alone = PadCollate()

    def __repr__(self) -> str:
        names = (f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({', '.join(names)})"

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Returns the micro-batch, as above.

        Raises:
            UserError: a sample is no sequence, or is one of another kind than the others.
            ValueError: there are no samples.
        """
        if len(samples) == 0:
            raise ValueError("a micro-batch needs at least one sample")
        # Each as a micro-batch of its own: its fields are checked and made tensors [1, T_i, ...] there.
        rows = [self._alone([sample]) for sample in samples]
        first = rows[0]
        is_mapping = isinstance(first, Mapping)
        if not is_mapping and not (isinstance(first, tuple) and len(first) == 2):
            raise UserError(
                f"a sample can't be packed, as it is a {type(samples[0]).__name__}: it must be a tuple (tokens, "
                "targets) or a mapping of tensors of one length. Change the samples, or set batch=by_length."
            )
        lengths = [_length_of(row) for row in rows]
        columns = [leaves(row) for row in rows]
        if len({tuple(row) if isinstance(row, Mapping) else len(row) for row in rows}) > 1:
            raise UserError("samples can't be packed, as they don't have the same fields.")
        fields = iter([torch.cat(list(parts), dim=1) for parts in zip(*columns, strict=True)])
        packed = mapped(first, lambda _: next(fields))
        inputs = packed if is_mapping else {self.tokens: packed[0]}
        names = {"position_ids": self.position_ids, "sample_lengths": self.sample_lengths}
        if not any(names.values()):
            names["position_ids" if is_mapping else "sample_lengths"] = (
                "position_ids" if is_mapping else "sample_lengths"
            )
        if names["position_ids"]:
            inputs[names["position_ids"]] = torch.cat([torch.arange(length) for length in lengths])[None]
        if names["sample_lengths"]:
            inputs[names["sample_lengths"]] = torch.tensor(lengths)
        return inputs if is_mapping else (inputs, packed[1])


def packing_of(dataset: Any) -> Callable[[list[Any]], Any]:
    """Returns what packs the samples of a dataset: its own `pack_fn`, else `PackCollate()`."""
    return getattr(dataset, "pack_fn", None) or PackCollate()


def _length_of(row: Any) -> int:
    """Returns the length that all tensors of a sample have.

    Raises:
        UserError: they don't, or there is something else in it.
    """
    found = leaves(row)
    shapes = [list(leaf.shape[1:]) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in found]
    lengths = {shape[0] if isinstance(shape, list) and shape else None for shape in shapes}
    if len(lengths) != 1 or None in lengths:
        raise UserError(
            f"a sample can't be packed: its fields are {', '.join(map(str, shapes))}, and they must all be sequences "
            "of one length. Leave the others out, or set batch=by_length."
        )
    return int(lengths.pop())  # type: ignore[arg-type]

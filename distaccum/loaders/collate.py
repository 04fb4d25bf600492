"""The default collate: stacks what has one shape, pads what differs in length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate, get_worker_info

from distaccum.errors import UserError, listed
from distaccum.loaders.hand_over import MOST_BY_VALUE
from distaccum.runtime.nested import mapped, tensors_of

_KEPT = (str, bytes, type(None))
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float32}
_MEND = "Give data.collate_fn, a function that makes a micro-batch of a list of samples."


class Stacked(Sequence[Any]):
    """Samples that a dataset's `__getitems__` has read as one micro-batch: `PadCollate` takes it as it is.

    Args:
        batch: a tensor, or a tuple or mapping of tensors, `[B, ...]` each; sample `i` has the i-th of each.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(tensors_of(self.batch)[0])

    def __getitem__(self, index: Any) -> Any:
        return mapped(self.batch, lambda tensor: tensor[index])


class PadCollate:
    """Makes a micro-batch of a list of samples, padding to the longest of the micro-batch and no further.

    A sample is a tuple or list of fields, a mapping of fields, or one field alone. A field is a tensor, a numpy array,
    a number, a list of numbers, or a tuple or mapping of fields again. Fields of one shape are stacked; fields that
    differ in nothing but the size of their first dimension are padded at its end. With `B` samples, shapes `[T_i, ...]`
    become `[B, max T_i, ...]`. dtypes are kept; Python's ints become int64, its floats float32, its bools bool. Text,
    bytes and None, such as the name of a file, become a list of `B` of them.

        >>> collate = PadCollate((0, -100))
        >>> collate([(torch.tensor([5, 6]), torch.tensor([6, 7])), (torch.tensor([8]), torch.tensor([9]))])
        (tensor([[5, 6],
                [8, 0]]), tensor([[   6,    7],
                [   9, -100]]))

    Args:
        pad_values: the value that field `i` is padded with; the last one serves the fields beyond. The fields of a
            mapping are counted in the order of the first sample's keys, and fields within a field are its.
    """

    def __init__(self, pad_values: Sequence[float] = (0,)) -> None:
        if len(pad_values) == 0:
            raise UserError("PadCollate: pad_values is empty. Give at least one number; the last one is repeated.")
        self.pad_values = tuple(pad_values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pad_values})"

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Returns a tuple for tuples and lists (a named tuple for those), a dict for mappings, else a tensor.

        Raises:
            UserError: the samples have different fields, or a field's types, dtypes or shapes don't go together.
            ValueError: there are no samples.
        """
        if isinstance(samples, Stacked):
            return samples.batch
        if len(samples) == 0:
            raise ValueError("a micro-batch needs at least one sample")
        return self._collated(samples, None, None)

    def _collated(self, values: Sequence[Any], index: int | None, name: str | None) -> Any:
        """Makes one of several values of a kind: samples, or what they have in a field of some index and name."""
        first = values[0]
        if type(first) is Tensor and (stacked := _stacked(values)) is not None:
            return stacked
        at = (lambda number: number) if index is None else (lambda number: index)
        within = "" if name is None else f"{name}."
        kinds = set(map(type, values))
        if name is not None and all(issubclass(kind, _KEPT) for kind in kinds):
            return list(values)
        if len(kinds) == 1 and (dtype := _NUMBERS.get(type(first))) is not None:
            return torch.tensor(values, dtype=dtype)
        if isinstance(first, Mapping):
            return {
                key: self._collated(column, at(number), f"{within}{key!r}")
                for number, (key, column) in enumerate(_columns(values, kinds).items())
            }
        if isinstance(first, tuple | list) and not (index is not None and is_numbers(first)):
            if not all(isinstance(value, tuple | list) and len(value) == len(first) for value in values):
                _check_fields([len(value) if isinstance(value, tuple | list) else type(value) for value in values])
            fields = [
                self._collated([value[number] for value in values], at(number), f"{within}{number}")
                for number in range(len(first))
            ]
            # A user who names the fields of a sample reads them by name from the micro-batch too.
            return type(first)(*fields) if hasattr(first, "_fields") else tuple(fields)
        return self._field(values, index or 0, name)

    def _field(self, values: Sequence[Any], index: int, name: str | None) -> Tensor:
        what = "the samples" if name is None else f"field {name} of the samples"
        tensors = [_as_tensor(value, what) for value in values]
        dtypes = list(dict.fromkeys(tensor.dtype for tensor in tensors))
        if len(dtypes) > 1:
            # Promoting them would make the dtype depend on which samples happen to be in the micro-batch.
            raise UserError(
                f"{what} cannot be made into a micro-batch: their dtypes differ ({listed(dtypes, 4)}). {_MEND}"
            )
        shapes = list(dict.fromkeys(tuple(tensor.shape) for tensor in tensors))
        if len(shapes) == 1:
            return _stack(tensors)
        if any(len(shape) == 0 for shape in shapes) or len({shape[1:] for shape in shapes}) > 1:
            raise UserError(
                f"{what} cannot be made into a micro-batch: their shapes {listed(shapes, 4)} differ in more than the "
                f"size of the first dimension. {_MEND}"
            )
        pad_value = self.pad_values[min(index, len(self.pad_values) - 1)]
        if not _fits(pad_value, dtypes[0]):
            raise UserError(
                f"{what} cannot be padded with {pad_value}, which {dtypes[0]} does not hold. Give PadCollate another "
                "pad value for that field, or samples of another dtype."
            )
        return pad_sequence(tensors, batch_first=True, padding_value=pad_value)


def _columns(rows: Sequence[Any], kinds: set[type]) -> dict[Any, list[Any]]:
    """Returns the values of each key of mappings, in the order of the first one's keys."""
    if kinds == {dict} and len(set(map(len, rows))) == 1:  # as rows are, where comparing all keys costs the most
        with suppress(KeyError):
            return {key: [row[key] for row in rows] for key in rows[0]}
    _check_fields([frozenset(row) if isinstance(row, Mapping) else type(row) for row in rows])
    return {key: [row[key] for row in rows] for key in rows[0]}


def _stacked(values: Sequence[Any]) -> Tensor | None:
    """Stacks tensors of one shape and dtype, which is what most fields are; None if they are anything else."""
    shape, dtype = values[0].shape, values[0].dtype
    for value in values:
        if type(value) is not Tensor or value.shape != shape or value.dtype != dtype:
            return None
    return _stack(values)


def _stack(tensors: Any) -> Tensor:
    if get_worker_info() is None or len(tensors) * tensors[0].nbytes <= MOST_BY_VALUE:
        return torch.stack(tensors)
    stacked: Tensor = default_collate(tensors)  # straight into shared memory
    return stacked


def _fits(value: float, dtype: torch.dtype) -> bool:
    """Whether a field of this dtype can hold the value; what floating point rounds is accepted."""
    if dtype.is_floating_point or dtype.is_complex:
        return True
    if dtype == torch.bool:
        return value in (0, 1)
    limits = torch.iinfo(dtype)
    return limits.min <= value <= limits.max and int(float(value)) == value  # pad_sequence takes a float


def is_numbers(value: Any) -> bool:
    """Whether a list has numbers alone, as the rows of tables have them."""
    return isinstance(value, list) and all(isinstance(entry, bool | int | float) for entry in value)


def _as_tensor(value: Any, what: str) -> Tensor:
    # numpy's scalars come before Python's numbers: np.float64 is a float, but has a dtype of its own to keep.
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic):
        try:
            return torch.tensor(value)
        except TypeError as error:
            raise UserError(f"{what}: a numpy array of dtype {value.dtype} is no tensor ({error}). {_MEND}") from error
    if isinstance(value, bool | int | float):
        return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else None)
    if is_numbers(value):
        return torch.tensor(value, dtype=None if value else torch.int64)
    raise UserError(
        f"{what} cannot be made into a micro-batch: a {type(value).__name__} is no tensor, numpy array, number or list "
        f"of numbers. {_MEND}"
    )


def _check_fields(kinds: list[Any]) -> None:
    """Refuses samples of unequal fields; `kinds` says for each sample which fields it has."""
    distinct = [set(kind) if isinstance(kind, frozenset) else kind for kind in dict.fromkeys(kinds)]
    if len(distinct) > 1:
        raise UserError(
            f"the samples cannot be made into a micro-batch: they do not have the same fields ({listed(distinct, 4)}). "
            f"{_MEND}"
        )

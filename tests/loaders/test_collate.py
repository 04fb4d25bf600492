import pickle
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distaccum.data import PadCollate
from distaccum.errors import UserError
from distaccum.loaders.collate import Stacked


def integers(*shape: int) -> torch.Tensor:
    return torch.arange(int(np.prod(shape)), dtype=torch.int64).reshape(shape) + 1


def test_equal_shapes_are_stacked() -> None:
    images, labels = PadCollate()([(torch.full((1, 2, 2), float(i)), i) for i in range(3)])
    assert images.shape == (3, 1, 2, 2)
    assert images[:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 2]


def test_samples_that_were_read_together_are_taken_as_they_are() -> None:
    batch = {"tokens": integers(3, 2), "parts": (integers(3), integers(3, 4))}
    samples = Stacked(batch)
    assert PadCollate()(samples) is batch
    one_by_one = list(samples)
    assert len(samples) == len(one_by_one) == 3
    assert one_by_one[2]["parts"][0].item() == 3
    again = PadCollate()(one_by_one)
    assert all(map(torch.equal, [again["tokens"], *again["parts"]], [batch["tokens"], *batch["parts"]]))


def test_tensors_of_one_shape_and_two_dtypes_are_refused_wherever_they_come() -> None:
    for place in range(3):
        values = [torch.zeros(2, dtype=torch.float64 if number == place else torch.float32) for number in range(3)]
        with pytest.raises(UserError, match="their dtypes differ"):
            PadCollate()([(value,) for value in values])


def test_a_list_sample_gives_a_tuple() -> None:
    batch = PadCollate()([[1, 2.5], [3, 4.5]])
    assert isinstance(batch, tuple)
    assert [field.dtype for field in batch] == [torch.int64, torch.float32]


def test_a_named_tuple_keeps_its_names() -> None:
    class Sample(NamedTuple):
        image: torch.Tensor
        label: int

    batch = PadCollate()([Sample(torch.zeros(2), 1), Sample(torch.ones(2), 0)])
    assert isinstance(batch, Sample)
    assert torch.equal(batch.label, torch.tensor([1, 0]))


def test_mappings_are_collated_by_key_and_padded_in_the_order_of_keys() -> None:
    batch = PadCollate((0, -100))(
        [{"tokens": integers(2), "labels": integers(2)}, {"labels": integers(1), "tokens": integers(1)}]
    )
    assert batch["tokens"].tolist() == [[1, 2], [1, 0]]
    assert batch["labels"].tolist() == [[1, 2], [1, -100]]


def test_a_sample_of_one_field() -> None:
    assert PadCollate()([integers(1), integers(3)]).tolist() == [[1, 0, 0], [1, 2, 3]]
    assert PadCollate()([4, 5]).tolist() == [4, 5]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1, torch.int64),
        (1.5, torch.float32),
        (True, torch.bool),
        (np.float64(1.5), torch.float64),
        (np.int32(2), torch.int32),
        (np.zeros((2, 2), dtype=np.uint8), torch.uint8),
        (torch.zeros(2, dtype=torch.float16), torch.float16),
    ],
)
def test_dtypes(value: object, dtype: torch.dtype) -> None:
    assert PadCollate()([value, value]).dtype == dtype


def test_a_read_only_array_is_copied_without_a_warning() -> None:
    array = np.zeros(3, dtype=np.float32)
    array.flags.writeable = False
    assert PadCollate()([array, array]).shape == (2, 3)


def test_the_last_pad_value_is_repeated() -> None:
    batch = PadCollate((7, 8))([(integers(1),) * 4, (integers(2),) * 4])
    assert [field[0, 1].item() for field in batch] == [7, 8, 8, 8]


def test_padding_of_more_dimensions() -> None:
    batch = PadCollate((-1.5,))([torch.ones(2, 3), torch.ones(4, 3)])
    assert batch.shape == (2, 4, 3)
    assert batch[0, 2:].unique().tolist() == [-1.5]


def test_nests_and_text() -> None:
    samples = [
        {"ids": [5, 6], "name": "a.txt", "image": {"pixels": torch.ones(2), "size": (3, 4)}, "note": None},
        {"ids": [7], "name": "ü.txt", "image": {"pixels": torch.zeros(2), "size": (5, 6)}, "note": "x"},
    ]
    batch = PadCollate((-1, 0))(samples)
    assert batch["ids"].tolist() == [[5, 6], [7, -1]]
    assert batch["ids"].dtype == torch.int64
    assert batch["name"] == ["a.txt", "ü.txt"]
    assert batch["note"] == [None, "x"]
    assert batch["image"]["pixels"].tolist() == [[1, 1], [0, 0]]
    assert [size.tolist() for size in batch["image"]["size"]] == [[3, 5], [4, 6]]


def test_lists_of_numbers() -> None:
    """Columns of tables: a field of a sample, and empty too. A sample that is a list has fields."""
    assert PadCollate()([([1, 2], [True]), ([], [False])])[0].tolist() == [[1, 2], [0, 0]]
    assert PadCollate()([([1.5, 2], 1)])[0].dtype == torch.float32
    assert [field.tolist() for field in PadCollate()([[1, 2], [3, 4]])] == [[1, 3], [2, 4]]


def test_nothing_is_padded_where_lengths_are_equal() -> None:
    # A pad value that the dtype does not hold hurts only when it is needed.
    assert PadCollate((0.5,))([integers(2), integers(2)]).tolist() == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([(torch.zeros(2, 3), 0), (torch.zeros(2, 4), 1)], r"field 0 .*\(2, 3\), \(2, 4\) differ in more"),
        ([(0, torch.zeros(2)), (1, torch.zeros(2, 1))], r"field 1 .*\(2,\), \(2, 1\)"),
        ([(0, torch.zeros(2)), (1, torch.zeros(()))], r"field 1 .*\(2,\), \(\)"),
        ([{"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 4)}], r"field 'a' "),
        ([torch.zeros(1, 2), torch.zeros(1, 3)], r"^the samples cannot"),
        ([(1, 2), (1, 2, 3)], r"same fields \(2, 3\)"),
        ([(1, 2), 3], r"same fields \(2, <class 'int'>\)"),
        ([{"a": 1}, {"b": 1}], r"same fields \({'a'}, {'b'}\)"),
        ([{"a": 1}, (1,)], r"same fields"),
        (["text", "other"], r"the samples .*a str is no tensor"),
        ([("text",), (1,)], r"field 0 .*a str is no tensor"),
        ([(1, {2}), (1, {3})], r"field 1 .*a set is no tensor"),
        ([{"a": {"b": torch.zeros(2, 3)}}, {"a": {"b": torch.zeros(2, 4)}}], r"field 'a'.'b' "),
        ([{"a": ("text", [1])}, {"a": ("text", ["b"])}], r"same fields|field 'a'.1 .*a list is no tensor"),
        ([(np.array(["a"]),)], r"numpy array of dtype <U1"),
        ([(1, 2), (1.5, 2)], r"field 0 .*dtypes differ \(torch.int64, torch.float32\)"),
        ([(torch.zeros(1),), (torch.zeros(2).double(),)], r"dtypes differ"),
    ],
)
def test_what_does_not_go_together_is_refused(samples: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        PadCollate()(samples)
    assert "data.collate_fn" in str(caught.value)


@pytest.mark.parametrize(
    ("pad_value", "dtype"), [(-100, torch.uint8), (300, torch.uint8), (0.5, torch.int64), (2, torch.bool)]
)
def test_a_pad_value_that_the_dtype_does_not_hold_is_refused(pad_value: float, dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=f"padded with {pad_value}, which {dtype} does not hold"):
        PadCollate((pad_value,))([torch.zeros(1, dtype=dtype), torch.zeros(2, dtype=dtype)])


def test_no_pad_values() -> None:
    with pytest.raises(UserError, match="pad_values is empty"):
        PadCollate(())


def test_no_samples_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        PadCollate()([])


def test_many_shapes_make_a_short_message() -> None:
    with pytest.raises(UserError, match=r"and 6 more") as caught:
        PadCollate()([torch.zeros(1, size) for size in range(10)])
    assert len(str(caught.value)) < 400


def test_it_travels_to_worker_processes() -> None:
    copy = pickle.loads(pickle.dumps(PadCollate((0, -100))))
    assert copy.pad_values == (0, -100)
    assert repr(copy) == "PadCollate((0, -100))"


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    rest=st.lists(st.integers(1, 3), max_size=2),
    pad_value=st.integers(-1000, 0),
)
def test_every_element_is_kept_and_everything_else_is_padding(
    lengths: list[int], rest: list[int], pad_value: int
) -> None:
    samples = [integers(length, *rest) for length in lengths]
    batch = PadCollate((pad_value,))([(sample,) for sample in samples])[0]
    assert batch.shape == (len(lengths), max(lengths), *rest)
    for row, sample in zip(batch, samples, strict=True):
        assert torch.equal(row[: len(sample)], sample)
        assert (row[len(sample) :] == pad_value).all()

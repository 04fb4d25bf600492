from __future__ import annotations

import logging
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Ended, updates
from hypothesis import given, settings
from hypothesis import strategies as st

from distaccum import WindowLoader
from distaccum.data import TokenData
from distaccum.data.splits import EVALUATION, TRAIN, HeldOut
from distaccum.data.storage.made_once import FOLDER
from distaccum.errors import UserError

END, VOCAB = 0, 1000


def write(path: Path, tokens: Any, form: str = "raw") -> Path:
    """Writes tokens as nanoGPT, as llm.c, or as numpy does."""
    if form == "npy":
        np.save(path.with_suffix(".npy"), np.array(tokens, np.uint32))
        return path.with_suffix(".npy")
    header = b""
    if form == "llm.c":
        header = np.array([20240520, 1, len(tokens)] + [0] * 253, np.int32).tobytes()
    path.write_bytes(header + np.array(tokens, np.uint16).tobytes())
    return path


FORMS = st.sampled_from(["raw", "llm.c", "npy"])
FILES = st.lists(st.tuples(FORMS, st.lists(st.integers(0, 5), max_size=30)), min_size=1, max_size=5)


def opened(files: list[tuple[str, list[int]]], folder: str, split: str = TRAIN, **options: Any) -> TokenData | None:
    """Writes files and opens them; None where they are too few for a sample."""
    paths = [str(write(Path(folder, f"{n}.bin"), tokens, form)) for n, (form, tokens) in enumerate(files)]
    try:
        return TokenData(split, paths, **{"vocab_size": 6, "evaluation_fraction": 0.0} | options)
    except UserError as error:
        if "has no sample" in str(error) or "end_token is nowhere" in str(error):
            return None
        raise


def lists(data: TokenData | None) -> list[list[int]]:
    """The tokens of each sample: of inputs and the last target, or of `input_ids`."""
    found = []
    for number in range(len(data) if data is not None else 0):
        assert data is not None
        sample = data[number]
        if isinstance(sample, tuple):
            inputs, targets = (part.tolist() for part in sample)
            assert inputs[1:] == targets[:-1]
            assert len(inputs) == data.lengths[number]
            found.append([*inputs, targets[-1]])
        else:
            assert sample["input_ids"].tolist() == sample["labels"].tolist()
            found.append(sample["labels"].tolist())
            assert len(found[-1]) == data.lengths[number]
    return found


@settings(max_examples=40, deadline=None)
@given(
    files=FILES,
    length=st.integers(2, 9),
    form=st.sampled_from(["targets", "labels"]),
    whole=st.booleans(),
    data=st.data(),
)
def test_samples_read_together_are_those_read_one_by_one(
    files: list[tuple[str, list[int]]], length: int, form: str, whole: bool, data: st.DataObject
) -> None:
    """Within files, across their ends, and of files of both dtypes; with what is held out in between."""
    documents = {"whole_documents": True, "end_token": END} if whole else {"evaluation_fraction": 0.5}
    with TemporaryDirectory() as folder:
        found = opened(files, folder, max_length=length, form=form, **documents)
        if found is None:
            return
        indices = data.draw(st.lists(st.integers(0, len(found) - 1), min_size=1, max_size=6))
        together, one_by_one = found.__getitems__(indices), [found[index] for index in indices]
        assert len(together) == len(indices)
        for several in (together, list(together)):
            batches = [found.collate_fn(samples) for samples in (several, one_by_one)]
            one, other = (list(b.values()) if isinstance(b, dict) else list(b) for b in batches)
            assert len(one) == len(other) == 2
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b)
                assert (a.dtype, a.is_contiguous()) == (torch.int64, True)
            assert one[0].data_ptr() != one[1].data_ptr()


def test_a_token_beyond_the_vocabulary_is_named_of_samples_read_together(tmp_path: Path) -> None:
    file = write(tmp_path / "x.bin", [*range(1, 30), 999, *range(1, 20)])
    data = TokenData(TRAIN, str(file), max_length=8, vocab_size=999, evaluation_fraction=0.0)
    with pytest.raises(UserError, match=r"x.bin, token 29 is 999, and data.vocab_size=999"):
        data.__getitems__([0, 3, 1])
    with pytest.raises(IndexError):
        data.__getitems__([0, len(data)])


@settings(max_examples=60, deadline=None)
@given(files=FILES, length=st.integers(2, 9), form=st.sampled_from(["targets", "labels"]))
def test_pieces_of_a_fixed_length_do_not_depend_on_files(
    files: list[tuple[str, list[int]]], length: int, form: str
) -> None:
    every = [token for _, tokens in files for token in tokens]
    ahead = 1 if form == "targets" else 0
    pieces = [every[start : start + length + ahead] for start in range(0, len(every), length)]
    with TemporaryDirectory() as folder:
        data = opened(files, folder, max_length=length, form=form)
        assert lists(data) == [piece for piece in pieces if len(piece) == length + ahead]


def documents_of(tokens: list[int]) -> Iterator[list[int]]:
    document: list[int] = []
    for token in tokens:
        document.append(token)
        if token == END:
            yield document
            document = []
    if document:
        yield document


def cut(document: list[int], length: int, ahead: int) -> list[list[int]]:
    """A sample has a token and the next one at least."""
    pieces = [document[start : start + length + ahead] for start in range(0, len(document), length)]
    return [piece for piece in pieces if len(piece) > 1]


@settings(max_examples=25, deadline=None)
@given(
    files=FILES,
    length=st.integers(2, 9),
    form=st.sampled_from(["targets", "labels"]),
    fraction=st.sampled_from([0.0, 0.3, 0.5]),
)
def test_whole_documents(files: list[tuple[str, list[int]]], length: int, form: str, fraction: float) -> None:
    every = list(documents_of([token for _, tokens in files for token in tokens]))
    options: dict[str, Any] = {"max_length": length, "form": form, "whole_documents": True, "end_token": END}
    is_held_out = naive_split(len(every), fraction, 1)
    with TemporaryDirectory() as folder:
        for split in (TRAIN, EVALUATION) if fraction else (TRAIN,):
            data = opened(files, folder, split, evaluation_fraction=fraction, **options)
            taken = [document for document, out in zip(every, is_held_out, strict=True) if out == (split == EVALUATION)]
            if any(END in document for document in every):
                assert lists(data) == [piece for entry in taken for piece in cut(entry, length, int(form == "targets"))]
            else:
                assert data is None


def naive_split(total: int, fraction: float, block: int) -> list[bool]:
    """Whether each sample is held out: where the number of blocks that ought to be by then has just grown."""
    exact, found, held = Fraction(fraction).limit_denominator(10**6), [], 0
    for number in range(-(-total // block)):
        is_out = held < exact * (number + 1)
        held += is_out
        found += [is_out] * block
    return found[:total]


@settings(max_examples=200, deadline=None)
@given(total=st.integers(0, 300), fraction=st.floats(0, 0.99), block=st.integers(1, 7))
def test_what_is_held_out_is_arithmetic(total: int, fraction: float, block: int) -> None:
    split = HeldOut(fraction, block)
    out = naive_split(total, fraction, block)
    for part in (TRAIN, EVALUATION):
        places = [split.place(index, part) for index in range(split.count(total, part))]
        assert places == [number for number in range(total) if out[number] == (part == EVALUATION)]
        assert split.place(np.arange(len(places)), part).tolist() == places
    blocks = -(-total // block)
    assert split.contains(0, blocks).tolist() == out[::block]
    assert split.contains(blocks // 2, blocks - blocks // 2).tolist() == out[::block][blocks // 2 :]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As nanoGPT and others write it."""
    draw = np.random.default_rng(0)
    for name, count in (("train", 900), ("val", 200), ("test", 50)):
        write(tmp_path / f"{name}.bin", draw.integers(0, VOCAB, count))
    return tmp_path


def test_a_folder_of_nano_gpt(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train, evaluation = (
            TokenData(split, str(folder), max_length=64, vocab_size=VOCAB) for split in (TRAIN, EVALUATION)
        )
    assert (len(train), len(evaluation)) == (14, 3)
    assert f"data.files: {folder}/test.bin is left out, by its name" in caplog.text
    assert (
        "train data: 14 samples of 1 file with 900 tokens; the last 3 tokens fill no sample and are left out"
        in caplog.text
    )
    assert (evaluation[0][0].numpy() == np.fromfile(folder / "val.bin", np.uint16)[:64]).all()  # type: ignore[index]
    both = {"files": str(folder), "evaluation_files": str(folder), "max_length": 64, "vocab_size": VOCAB}
    assert [len(TokenData(split, **both)) for split in (TRAIN, EVALUATION)] == [14, 3]  # type: ignore[arg-type]


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = str(write(tmp_path / "other.bin", [5]))
    file = str(write(tmp_path / "x.bin", [5, 5, END, END, *[7] * 8, END, 3, END, 4, 4]))
    options: dict[str, Any] = {"max_length": 4, "vocab_size": 9, "whole_documents": True, "end_token": END}
    with caplog.at_level(logging.INFO):
        TokenData(TRAIN, [file], evaluation_files=other, form="labels", **options)
    assert (
        "train data: 5 samples of 1 file with 17 tokens; 5 documents; 1 are longer than data.max_length=4 and are"
        in (caplog.text)
    )
    assert (
        "1 are left out, as they have no token and a next one; 1 leave a last token alone, which is left" in caplog.text
    )


def test_where_documents_end_is_found_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "x.bin", [1, 2, END, 3, END])

    def start(**options: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            TokenData(TRAIN, str(file), vocab_size=9, whole_documents=True, end_token=END, **options)
        return caplog.text

    made = "made the document-ends of"
    assert "x.bin: 2 documents end there" in start()
    assert len(list((tmp_path / FOLDER).glob("x.bin.*"))) == 2
    assert made not in start() + start(max_length=2) + start(evaluation_fraction=0.0)
    write(file, [1, END, 2, END, 3, END])
    assert "x.bin: 3 documents end there" in start()


def test_an_index_beside_data_that_cannot_be_written_is_kept_elsewhere(tmp_path: Path) -> None:
    file = write(tmp_path / "x.bin", [1, 2, END, 3, END])
    (tmp_path / FOLDER).touch()
    data = TokenData(TRAIN, str(file), vocab_size=9, whole_documents=True, end_token=END, evaluation_fraction=0.0)
    assert lists(data) == [[1, 2, END], [3, END]]
    assert (tmp_path / FOLDER).read_bytes() == b""


def test_it_is_small_when_it_goes_to_a_worker(tmp_path: Path) -> None:
    file = write(tmp_path / "x.bin", [*range(1, 100), END] * 1000)
    for options in ({}, {"whole_documents": True, "end_token": END}):
        data = TokenData(TRAIN, str(file), vocab_size=VOCAB, max_length=50, **options)  # type: ignore[arg-type]
        first = lists(data)
        sent = pickle.dumps(data)
        assert len(sent) < 5000
        assert lists(pickle.loads(sent)) == first


def test_a_hundred_billion_tokens(tmp_path: Path, train: Callable[..., Ended]) -> None:
    """Starts take no longer and no more memory for them: files are sparse, and nothing is read but the samples."""
    for number in range(1000):
        with (tmp_path / f"train_{number:05d}.bin").open("wb") as file:
            file.truncate(200_000_000)
    write(tmp_path / "val.bin", [1] * 99)
    tracemalloc.start()
    data = TokenData(TRAIN, str(tmp_path), max_length=16, vocab_size=VOCAB)
    loader = WindowLoader(data, global_batch_size=480)
    assert len(loader) == -(-6_249_999_999 // 480)
    window = next(iter(loader))
    assert sum(len(inputs) for inputs, _ in window) == 480
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 << 20
    ended = train(
        *("data=tokens", f"data.files={tmp_path}", "data.max_length=16", f"data.vocab_size={VOCAB}", "optim=adamw"),
        *("model=gpt", "task=language_modeling", "model.num_layers=1", "model.width=8", "model.num_heads=1"),
        *("batch.global_batch_size=480", "batch.micro_batch_size=240", "train.max_updates=2", "run_dir=run"),
        "wandb.mode=disabled",
    )
    assert (ended.status, ended.err) == (0, "")
    assert len(updates(Path("run"))) == 2


def test_a_run_on_whole_documents_packed_and_by_length(tmp_path: Path, train: Callable[..., Ended]) -> None:
    """The same updates for any cut."""
    draw = np.random.default_rng(0)
    documents = [[*draw.integers(1, 9, draw.integers(2, 20)).tolist(), END] for _ in range(60)]
    write(tmp_path / "train.bin", [token for document in documents for token in document])
    losses = []
    for batch in ("uniform", "by_length", "packed"):
        ended = train(
            *("data=tokens", "data.files=train.bin", "data.max_length=12", "data.vocab_size=9", "optim=adamw"),
            *("data.whole_documents=true", f"data.end_token={END}", "data.evaluation_fraction=0.2", "model=gpt"),
            *("task=language_modeling", "model.num_layers=1", "model.width=8", "model.num_heads=1", "precision=fp64"),
            *(f"batch={batch}", "batch.global_batch_size=16", f"run_dir={batch}", "wandb.mode=disabled"),
            *("batch.micro_batch_size=4", "train.epochs=1"),
        )
        assert (ended.status, ended.err) == (0, "")
        losses.append([line["loss"] for line in updates(Path(batch))])
    assert len(losses[0]) > 3
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-12)
    message = train(
        "data=tokens",
        "data.files=train.bin",
        "data.vocab_size=8",
        "model=gpt",
        "task=language_modeling",
        "data.max_length=12",
        "wandb.mode=disabled",
    ).message
    assert "train.bin, token " in message
    assert "is 8, and data.vocab_size=8 has tokens from 0 to 7" in message
    message = train(
        *("data=tokens", "data.files=train.bin", "data.vocab_size=9", "model=gpt", "data.max_length=12"),
        *("task=language_modeling", "data.form=labels", "wandb.mode=disabled"),
    ).message
    assert "the samples have input_ids, and the model takes no such argument" in message


def _array(values: Any) -> Callable[[Path], object]:
    return lambda path: np.save(path.with_suffix(".npy"), values)


def _content(content: bytes, name: str = "x.bin") -> Callable[[Path], object]:
    return lambda path: path.with_name(name).write_bytes(content)


_HEADER = np.array([20240520, 1, 7] + [0] * 253, np.int32).tobytes()


@pytest.mark.parametrize(
    ("made", "options", "said"),
    [
        (_content(b"123"), {}, r"x.bin has 3 bytes, which isn't a whole number of tokens \(of uint16\)"),
        (_content(_HEADER + b"12"), {}, "x.bin has 1026 bytes, which isn't the 7 tokens that its header says"),
        (_content(b"1234", "x.txt"), {"files": "x.txt"}, "x.txt is no file of tokens: those end with .bin or .npy"),
        (_content(b"no numpy", "x.npy"), {"files": "x.npy"}, "x.npy can't be read as tokens: "),
        (_array(np.zeros((2, 2), np.uint16)), {"files": "x.npy"}, r"an array of uint16 and of shape \(2, 2\)"),
        (_array(np.zeros(2, np.int64)), {"files": "x.npy"}, "an array of int64"),
        (_content(b"12" * 50), {"vocab_size": None}, r"data.vocab_size must be given.*50257"),
        (
            _content(b"12" * 50),
            {"max_length": 500},
            "the train data has no sample: 1 file with 50 tokens are too few for",
        ),
        (_content(b"12" * 50), {"max_length": 1, "form": "labels"}, "data.max_length=1 is impossible"),
        (_content(b"12" * 50), {"form": "pairs"}, "data.form=pairs is none of targets, labels"),
        (_content(b"12" * 50), {"dtype": "int8"}, "data.dtype=int8 is none of uint16, uint32"),
        (_content(b"12" * 50), {"evaluation_fraction": 1.0}, r"data.evaluation_fraction=1.0 must lie in \[0, 1\)"),
        (_content(b"12" * 50), {"end_token": 3}, "data.end_token=3 has no use with pieces of a fixed length"),
        (_content(b"12" * 50), {"whole_documents": True}, "nothing says where the documents of x.bin end"),
        (_content(b"12" * 50), {"whole_documents": True, "end_token": 3}, "data.end_token is nowhere in x.bin"),
        (_content(b"1\0\0\0" * 64), {}, "every other token of x.bin is 0.*data.dtype=uint32"),
        (
            _content(b"12" * 50),
            {"split": EVALUATION, "evaluation_fraction": 0},
            "the evaluation data has no sample.*data.evaluation=null needs none",
        ),
        (_content(b""), {"files": "."}, "the train data has no sample: 1 file with 0 tokens"),
        (_content(b"", "x.txt"), {"files": "."}, r"the folder \. has no files of tokens"),
        (_content(b"12" * 50), {"files": ["x.bin", "./x.bin"]}, "data.files: ./x.bin is named twice, also in data.fi"),
        (_content(b"12" * 50), {"evaluation_files": "x.bin"}, "data.evaluation_files: x.bin is named twice"),
        (_content(b""), {"files": "none.bin"}, "data.files: there is no file none.bin"),
        (
            _content(b"{}", "index.json"),
            {"files": "."},
            "index.json can't be read as what distaccum.data.tokenize writes",
        ),
    ],
)
def test_what_is_refused(
    made: Callable[[Path], object],
    options: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "x.bin")
    with pytest.raises(UserError, match=said):
        TokenData(**{"split": TRAIN, "files": "x.bin", "max_length": 8, "vocab_size": 65536} | options)


def test_ends_of_another_file_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "x.bin", range(20))
    for ends in (np.array([5, 4]), np.array([5, 25]), np.array([0, 3]), np.array([5, 6], np.int16)):
        ends.tofile(tmp_path / "x.ends")
        with pytest.raises(UserError, match=r"x.ends doesn't belong to .*x.bin: it must hold int64"):
            TokenData(TRAIN, str(file), whole_documents=True, vocab_size=20)


def test_a_file_that_becomes_shorter_or_goes_away_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "x.bin", range(200))
    data = TokenData(TRAIN, str(file), max_length=8, vocab_size=200)
    with file.open("r+b") as shortened:
        shortened.truncate(100)
    with pytest.raises(UserError, match=r"x.bin ends at byte .*, before byte 274: it is not whole"):
        lists(data)
    file.unlink()
    with pytest.raises(UserError, match=r"there is no file .*x.bin"):
        pickle.loads(pickle.dumps(data))[0]

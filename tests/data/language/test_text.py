import math
from collections import Counter
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distaccum.data import DocumentationText
from distaccum.data.language.text import cut, is_held_out, paragraphs
from distaccum.errors import UserError


@pytest.fixture(scope="module", params=["train", "evaluation"])
def text(request: pytest.FixtureRequest) -> DocumentationText:
    return DocumentationText(request.param)


def test_samples(text: DocumentationText) -> None:
    assert len(text) == len(text.lengths) > 100
    for length, (inputs, targets) in zip(text.lengths, (text[index] for index in range(len(text))), strict=True):
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (length,)
        assert 1 <= length <= text.max_length == 512
        assert torch.equal(inputs[1:], targets[:-1])
    assert text.vocab_size == 256


@settings(deadline=None, max_examples=25)
@given(max_length=st.integers(1, 1000), split=st.sampled_from(["train", "evaluation"]))
def test_every_byte_is_predicted_exactly_once(max_length: int, split: str) -> None:
    text = DocumentationText(split, max_length)
    predicted = b"".join(bytes(text[index][1].tolist()) for index in range(len(text)))
    assert predicted == "".join(paragraphs(split)).encode()


@given(length=st.integers(0, 10_000), max_length=st.integers(1, 600))
def test_cuts_are_consecutive_and_short_enough(length: int, max_length: int) -> None:
    pieces = list(cut(length, max_length))
    assert [place for start, stop in pieces for place in range(start, stop)] == list(range(length))
    assert all(1 <= stop - start <= max_length for start, stop in pieces)
    assert len(pieces) == math.ceil(length / max_length)


def test_the_first_byte_is_predicted_from_a_newline_and_a_cut_from_the_byte_before() -> None:
    text = DocumentationText("train", 16)
    first = paragraphs("train")[0].encode()
    assert len(first) > 32
    assert bytes(text[0][0].tolist()) == b"\n" + first[:15]
    assert bytes(text[1][0].tolist()) == first[15:31]
    assert bytes(text[1][1].tolist()) == first[16:32]


def test_evaluation_text_is_unseen() -> None:
    train, evaluation = paragraphs("train"), paragraphs("evaluation")
    assert not set(train) & set(evaluation)
    for name, document in topics.items():
        if is_held_out(name):
            found = {text.strip() for text in document.split("\n\n")} - {""}
            assert found <= set(evaluation)


def test_no_paragraph_is_lost_or_taken_twice() -> None:
    both = paragraphs("train") + paragraphs("evaluation")
    everything = {text.strip() for document in topics.values() for text in document.split("\n\n")} - {""}
    assert Counter(both) == Counter(everything)


def test_about_a_tenth_is_held_out() -> None:
    train, evaluation = (sum(len(text) for text in paragraphs(split)) for split in ("train", "evaluation"))
    assert 0.05 < evaluation / (train + evaluation) < 0.15


def test_padding_is_ignored(text: DocumentationText) -> None:
    places = sorted(range(len(text)), key=lambda place: text.lengths[place])
    short, long = places[0], places[-1]
    inputs, targets = text.collate_fn([text[short], text[long]])
    assert inputs.shape == targets.shape == (2, text.lengths[long])
    assert (inputs[0, text.lengths[short] :] == 0).all()
    assert (targets[0, text.lengths[short] :] == -100).all()
    assert (targets != -100).sum() == text.lengths[short] + text.lengths[long]


def test_the_reference_loss_is_that_of_the_best_unigram_model(text: DocumentationText) -> None:
    targets = torch.cat([text[index][1] for index in range(len(text))])
    log_frequencies = (targets.bincount(minlength=256) / len(targets)).log()
    loss = -log_frequencies[targets].double().mean().item()
    assert text.reference_losses == {"unigram entropy": pytest.approx(loss, rel=1e-5)}
    assert 2.5 < loss < 4


def test_the_split_does_not_change() -> None:
    one, other = (DocumentationText("evaluation", 64) for _ in range(2))
    assert one.lengths == other.lengths
    assert torch.equal(one[3][0], other[3][0])


@pytest.mark.parametrize(
    ("split", "max_length", "message"),
    [("valid", 8, "split='valid' is not known"), ("train", 0, "max_length=0 is impossible")],
)
def test_impossible_arguments(split: str, max_length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DocumentationText(split, max_length)

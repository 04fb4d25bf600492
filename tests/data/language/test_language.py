from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_language_model
import torch
from tiny_language_model import MARKED_TEMPLATE, UNMARKED_TEMPLATE

from distaccum.data import LanguageData, Rows, TokenizeRow
from distaccum.errors import UserError
from distaccum.loaders.lengths import lengths_of

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What colour has snow?"},
    {"role": "assistant", "content": "snow is white."},
    {"role": "user", "content": "What colour has coal?"},
    {"role": "assistant", "content": "coal is black."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_language_model.tokenizer().save_pretrained(path)
    (path / "unmarked.jinja").write_text(UNMARKED_TEMPLATE)
    return path


def data(folder: Path, rows: list[Any], **options: Any) -> LanguageData:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"evaluation_fraction": 0.0, "max_length": 128} | options
    return LanguageData(str(path), str(folder), **options)


def counted(found: LanguageData, index: int = 0) -> str:
    """What of a sample the loss counts, as text."""
    labels = found[index]["labels"]
    return str(found.tokenizer.decode(labels[labels != -100]))


@pytest.mark.parametrize("template", ["marked", "unmarked"])
def test_the_loss_counts_what_the_assistant_says(folder: Path, template: str) -> None:
    """With a template that marks it, and with one whose beginnings are compared: the same tokens."""
    options = {} if template == "marked" else {"chat_template": str(folder / "unmarked.jinja")}
    found = data(folder, [{"messages": CHAT}], **options)
    assert counted(found) == "snow is white.<|end|>coal is black.<|end|>"
    text = found.tokenizer.decode(found[0]["input_ids"])
    assert text.startswith("<|system|>Be short.<|end|><|user|>What colour has snow?<|end|><|assistant|>snow")
    assert counted(data(folder, [{"messages": CHAT}], loss_on="all", **options)) == text


def test_prompts_and_completions(folder: Path) -> None:
    rows = [
        {"prompt": "What colour has snow? ", "completion": "white"},
        {"prompt": CHAT[:2], "completion": CHAT[2:3]},
        {"prompt": CHAT[:4], "completion": CHAT[4:]},
    ]
    found = data(folder, rows)
    assert [counted(found, index) for index in range(3)] == [
        "white<|end|>",
        "snow is white.<|end|>",
        "coal is black.<|end|>",
    ]
    assert found.tokenizer.decode(found[0]["input_ids"]) == "What colour has snow? white<|end|>"
    assert counted(data(folder, rows, loss_on="all")) == "What colour has snow? white<|end|>"


def test_columns_of_other_names(folder: Path) -> None:
    rows = [{"question": "Snow? ", "answer": "white", "id": 3}]
    found = data(folder, rows, columns={"prompt": "question", "completion": "answer"})
    assert counted(found) == "white<|end|>"
    with pytest.raises(UserError, match=r"rows.jsonl, line 1 has the columns answer, id, question.*data.columns="):
        data(folder, rows)
    for wrong in ({"text": "body"}, {"question": "prompt"}):
        with pytest.raises(UserError, match=r"data.columns=\{.*\}: .*line 1 has the columns answer, id, question"):
            data(folder, rows, columns={"prompt": "question", "completion": "answer", **wrong})


def test_long_texts_are_cut_and_nothing_is_lost(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "What colour has snow? " * 10
    with caplog.at_level(logging.INFO):
        found = data(folder, [{"text": text}, {"text": "short"}], max_length=16)
    pieces = [found[index]["input_ids"] for index in range(len(found))]
    assert [len(piece) for piece in pieces] == found.lengths.tolist()
    assert max(found.lengths) == 16
    assert found.tokenizer.decode(torch.cat(pieces)) == f"{text}<|end|>short<|end|>"
    assert "1 texts were longer than data.max_length=16 and are several samples" in caplog.text


def test_what_is_cut_off_is_said_in_numbers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": CHAT}, {"prompt": "x " * 30, "completion": "white"}, {"prompt": "a", "completion": "b"}]
    whole = data(folder, rows)
    with caplog.at_level(logging.INFO):
        found = data(folder, rows, max_length=24)
    lost = int(sum(max(0, length - 24) for length in whole.lengths))
    assert f"2 were longer than data.max_length=24 and are cut off there ({lost} tokens, " in caplog.text
    assert "1 were left out, as nothing in them is left that the loss counts" in caplog.text
    assert found.lengths.tolist() == [24, whole.lengths[2]]
    assert torch.equal(found[0]["labels"], whole[0]["labels"][:24])


def test_each_row_is_held_out_or_trained_on(folder: Path) -> None:
    rows = [{"text": f"text {number}"} for number in range(200)]
    parts = [data(folder, rows, split=split, evaluation_fraction=0.1) for split in ("train", "evaluation")]
    texts = [{part.tokenizer.decode(part[index]["input_ids"]) for index in range(len(part))} for part in parts]
    assert not texts[0] & texts[1]
    assert texts[0] | texts[1] == {f"text {number}<|end|>" for number in range(200)}
    assert 10 <= len(texts[1]) <= 30
    other = folder / "other.jsonl"
    other.write_text('{"text": "other"}\n')
    named = data(folder, rows, split="evaluation", evaluation_files=str(other))
    assert (len(named), counted(named)) == (1, "other<|end|>")
    assert len(data(folder, rows, evaluation_files=str(other), evaluation_fraction=0.1)) == 200


def test_micro_batches_are_padded_at_the_right(folder: Path) -> None:
    found = data(folder, [{"text": "a"}, {"prompt": "a b c ", "completion": "d"}])
    batch = found.collate_fn([found[0], found[1]])
    lengths = found.lengths.tolist()
    assert batch["input_ids"].shape == (2, max(lengths))
    assert batch["labels"][0, lengths[0] :].unique().tolist() == [-100]
    assert torch.equal(batch["input_ids"][1], found[1]["input_ids"])
    assert np.array_equal(found.lengths, lengths)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "unmarked", "first message is the assistant's"),
        ([{"messages": []}], "", "must be a list of messages"),
        ([{"messages": [{"content": "a"}]}], "", "must be a list of messages with role"),
        ([{"prompt": "a", "completion": None}], "", "line 1: completion is missing"),
        ([{"text": 3}], "", "line 1: text is a int"),
        ([{"prompt": "a" * 500, "completion": "b"}], "", "has 1 rows and no sample"),
    ],
)
def test_rows_that_do_not_fit(folder: Path, rows: list[Any], options: str, message: str) -> None:
    more = {"chat_template": str(folder / "unmarked.jinja")} if options else {}
    with pytest.raises(UserError, match=message):
        data(folder, rows, **more)


def test_templates_that_do_not_tell_whose_tokens_are_whose(folder: Path, tmp_path: Path) -> None:
    """One that leaves out what all but the last answer says, as some do with their thoughts."""
    forgets = tmp_path / "forgets.jinja"
    forgets.write_text(
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] if loop.last or "
        "message['role'] == 'user' else '' }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    one = data(folder, [{"messages": CHAT[1:3]}], chat_template=str(forgets))
    assert counted(one) == "snow is white.<|end|>"
    with pytest.raises(UserError, match=r"line 1: the chat template writes the first \d messages otherwise"):
        data(folder, [{"messages": CHAT}], chat_template=str(forgets))
    wrong = tmp_path / "wrong.jinja"
    wrong.write_text("{{ raise_exception('only users') }}")
    with pytest.raises(UserError, match="line 1: the chat template can't be applied: TemplateError: only users"):
        data(folder, [{"messages": CHAT}], chat_template=str(wrong))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "data.max_length=1 is impossible"),
        ({"loss_on": "user"}, "data.loss_on=user is none of completion, all"),
        ({"evaluation_fraction": 1.0}, r"data.evaluation_fraction=1.0 must lie in \[0, 1\)"),
        ({"split": "test"}, "split='test' is not known"),
        ({"split": "evaluation"}, "set data.evaluation=null"),
        ({"chat_template": "none.jinja"}, "data.chat_template=none.jinja can't be read"),
    ],
)
def test_impossible_arguments(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data(folder, [{"text": "a"}], **options)


def test_a_tokenizer_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.tokenizer=.*can't be loaded: .*Give a folder"):
        LanguageData(str(folder / "rows.jsonl"), str(tmp_path / "none"))
    assert MARKED_TEMPLATE != UNMARKED_TEMPLATE


def test_a_cache_has_the_same_samples_and_is_made_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distaccum.data")
    rows = [*tiny_language_model.chats(9), {"text": "snow " * 90}, {"prompt": "sky? " * 30, "completion": "blue"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(rows[1]) + "\n")

    def read(**options: Any) -> LanguageData:
        return LanguageData(str(path), str(folder), max_length=48, **options)

    for options in ({}, {"split": "evaluation"}, {"loss_on": "all"}, {"evaluation_files": str(other)}):
        kept = read(**options)
        assert "made the tokens" not in caplog.text
        said = caplog.messages[-1]
        first = read(cache=True, **options)
        assert caplog.text.count("made the tokens of") == 1
        for found in (first, read(cache=True, **options), pickle.loads(pickle.dumps(first))):
            assert len(found) == len(kept)
            assert found.lengths.tolist() == kept.lengths.tolist()
            for index in range(len(kept)):
                assert all(torch.equal(found[index][name], kept[index][name]) for name in ("input_ids", "labels"))
        assert caplog.text.count("made the tokens of") == 1
        assert caplog.messages[-1] == said, "what has been left out is said at each start"
        caplog.clear()
    path.write_text(json.dumps(rows[0]) + "\n")
    assert len(read(cache=True, evaluation_files=str(other))) == 1
    with pytest.raises(UserError, match=r"rows\.jsonl is named twice, also in data\.files"):
        read(evaluation_files=str(path))
    with pytest.raises(UserError, match=r"has 0 rows and no sample"):
        read(cache=True)
    assert not list((tmp_path / ".distaccum").glob("*.writing"))


def test_rows_are_tokenised_when_they_are_asked_for(folder: Path) -> None:
    rows = [{"messages": CHAT}, {"prompt": "sky?", "completion": "blue"}, {"text": "snow"}]
    whole = data(folder, rows)
    transform = TokenizeRow(str(folder), max_length=128)
    found = Rows(str(folder / "rows.jsonl"), evaluation_fraction=0, transform=transform)
    assert (found.vocab_size, found.max_length) == (whole.vocab_size, whole.max_length)
    for index in range(3):
        assert all(torch.equal(found[index][name], whole[index][name]) for name in ("input_ids", "labels"))
    batch = found.collate_fn(found.__getitems__([2, 0]))
    assert batch["attention_mask"].sum(1).tolist() == whole.lengths[[2, 0]].tolist()
    short = TokenizeRow(str(folder), max_length=4)
    kept = [
        lengths_of(Rows(str(folder / "rows.jsonl"), evaluation_fraction=0, transform=one)).tolist()
        for one in (transform, short, TokenizeRow(str(folder), max_length=128))
    ]
    assert kept == [whole.lengths.tolist(), np.minimum(whole.lengths, 4).tolist(), whole.lengths.tolist()]
    assert len(list((folder / ".distaccum").glob("*.lengths"))) == 2, "by what the tokenizer is, and not by the object"
    assert short({"prompt": "What colour has snow?", "completion": "white"})["labels"].tolist() == [-100] * 4
    assert short({"text": ""})["labels"].tolist() == [0, -100], "never less than two tokens"
    (folder / "rows.jsonl").write_text('{"question": "sky?"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl, row 1, in data.transform: it has the columns question"):
        found = Rows(str(folder / "rows.jsonl"), evaluation_fraction=0, transform=transform)[0]
    for options in ({"max_length": 1}, {"loss_on": "prompt"}):
        with pytest.raises(UserError, match=r"data.max_length=1 is impossible|data.loss_on=prompt is none of"):
            TokenizeRow(str(folder), **options)

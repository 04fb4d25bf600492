from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_language_model
from command_line import Ended, evaluations, updates

from distaccum.data import TokenData
from distaccum.data.tokenize import main, tokenize
from distaccum.errors import UserError

WORDS = [
    "sky",
    "grass",
    "snow",
    "coal",
    "blood",
    "is",
    "blue",
    "green",
    "white",
    "black",
    "red",
    "what",
    "colour",
    "has",
    "é",
    "雪",
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which tokenize sets: so it is taken back


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_language_model.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    rows = [{"id": n, "text": " ".join(draw.choices(WORDS, k=draw.randint(0, 40)))} for n in range(2500)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "b.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["text"])
        table.writeheader()
        table.writerows({"text": row["text"][::-1]} for row in rows[:200])
    (folder / "c.txt").write_text("One text.\n\nOf several lines.")
    return [str(folder / "*.jsonl"), str(folder / "b.csv"), str(folder / "c.txt")]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(files: list[str], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that is not interrupted writes."""
    folder = tmp_path_factory.mktemp("whole")
    said = tokenize(files, str(tokenizer), folder, workers=1, shard_tokens=5000)
    assert said.startswith("2,701 documents, ")
    return content(folder)


def test_it_writes_the_tokens_of_each_text_and_the_end(
    files: list[str], tokenizer: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for name, found in whole.items():
        (tmp_path / name).write_bytes(found)
    loaded = tiny_language_model.tokenizer()
    options: dict[str, Any] = {
        "evaluation_fraction": 0.0,
        "whole_documents": True,
        "form": "labels",
        "max_length": 10**6,
    }
    data = TokenData("train", str(tmp_path), **options)
    assert data.vocab_size == len(loaded)
    with open(files[0].replace("*", "a")) as lines:
        texts = [json.loads(line)["text"] for line in lines]
    texts = [text for text in texts if text]  # of the others only the end token is there, which is no sample
    for number, text in enumerate(texts):
        assert data[number]["input_ids"].tolist() == [*loaded(text)["input_ids"], 0]  # type: ignore[call-overload]
    assert loaded.decode(data[len(data) - 1]["labels"]) == "One text.\n\nOf several lines.<|end|>"  # type: ignore[call-overload]
    index = json.loads(whole["index.json"])
    counts = [entry["tokens"] for entry in index["files"]]
    assert len(counts) > 5
    assert all(count >= 5000 for count in counts[:-1])
    assert np.load(tmp_path / "tokens-00000.npy").dtype == np.uint16
    # A fixed length needs no ends, and has every token but the last few.
    assert len(TokenData("train", str(tmp_path), evaluation_fraction=0.0, max_length=64)) == (sum(counts) - 1) // 64


def test_any_number_of_workers_writes_the_same(
    files: list[str], tokenizer: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    tokenize(files, str(tokenizer), tmp_path / "two", workers=2, shard_tokens=5000)
    assert content(tmp_path / "two") == whole


def test_killed_at_any_moment_it_goes_on(
    files: list[str], tokenizer: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out, draw = tmp_path / "out", random.Random(1)
    for complete in (0, 1, 4, 9):
        before = len(list(out.glob("*.ends")))
        process = multiprocessing.get_context("fork").Process(
            target=tokenize, args=(files, str(tokenizer), out), kwargs={"workers": 2, "shard_tokens": 5000}
        )
        process.start()
        # One more than before: by then it has the folder for itself.
        while complete and len(list(out.glob("*.ends"))) < max(complete, before + 1):
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGSTOP)  # else it may be done before it has been looked at
        if complete > 1:
            with pytest.raises(UserError, match="isn't complete"):
                TokenData("train", str(out))
            with pytest.raises(UserError, match="another process writes to"):
                tokenize(files, str(tokenizer), out, shard_tokens=5000)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    tokenize(files, str(tokenizer), out, workers=2, shard_tokens=5000)
    assert content(out) == whole
    stat = (out / "tokens-00000.npy").stat()
    assert tokenize(files, str(tokenizer), out, shard_tokens=5000).startswith("2,701 documents, ")
    assert (out / "tokens-00000.npy").stat() == stat


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def run(*arguments: str) -> Ended:
        capfd.readouterr()
        status = 0
        try:
            main(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Ended(status, *capfd.readouterr())

    return run


def test_what_is_refused(command: Callable[..., Ended], tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "snow", "other": 3}\n')
    (tmp_path / "none.jsonl").touch()
    file, given = str(tmp_path / "x.jsonl"), ("--tokenizer", str(tokenizer), "--workers", "1", "--out")
    out = str(tmp_path / "out")
    assert command(file, *given, out).status == 0
    other = str(tmp_path / "other")
    for arguments, said in (
        (
            (file, *given),
            "expected one argument. Write: python -m distaccum.data.tokenize FILES… --tokenizer NAME",
        ),
        ((str(tmp_path / "no.jsonl"), *given, other), "FILES: there is no file"),
        (
            (file, *given, other, "--column", "body"),
            "line 1: body is missing, and must be a text. The columns are other",
        ),
        ((file, *given, other, "--column", "other"), "line 1: other is a int, and must be a text"),
        ((str(tmp_path / "none.jsonl"), *given, other), "the FILES have no row"),
        ((file, f"{tmp_path}/x.*", *given, other), "x.jsonl is named twice"),
        ((file, "--tokenizer", "/none", "--out", other), "--tokenizer=/none can't be loaded"),
        ((file, *given, other, "--end-token", "900"), "--end-token=900 must be one of the "),
        ((file, *given, other, "--workers", "0"), "--workers=0 is impossible: it must be at least 1"),
        ((file, *given, other, "--shard-tokens", "0"), "--shard-tokens=0 is impossible"),
        ((file, *given, out, "--column", "other"), "out holds what was made from another column. Remove it, or give"),
        ((file, *given, out, "--end-token", "1"), "out holds what was made from another end_token"),
        ((file, *given, file), "can't be written"),
    ):
        assert said in command(*arguments).message, arguments


def test_a_worker_that_is_killed_is_one_message(
    files: list[str], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distaccum.data.tokenize._encode", _be_killed)
    with pytest.raises(UserError, match=r"a worker process was killed, perhaps for want of memory\. Set fewer"):
        tokenize(files, str(tokenizer), tmp_path / "out", workers=2)
    assert os.listdir(tmp_path / "out") == [".lock"]


def _be_killed(texts: list[str]) -> None:
    os.kill(os.getpid(), 9)


def test_a_model_of_transformers_trains_on_it(
    files: list[str], whole: dict[str, bytes], tmp_path: Path, train: Callable[..., Ended]
) -> None:
    (tmp_path / "tokens").mkdir()
    for name, found in whole.items():
        (tmp_path / "tokens" / name).write_bytes(found)
    tiny_language_model.write_model(tmp_path / "model", weights=False)
    run = [
        *("data=tokens", "data.files=tokens", "data.form=labels", "data.max_length=32", "data.whole_documents=true"),
        *("model=causal_lm", "model.name_or_path=model", "model.from_config=true", "task=causal_lm", "optim=adamw"),
        *("batch=packed", "batch.global_batch_size=16", "batch.micro_batch_size=8", "train.max_updates=2"),
        *("data.evaluation_fraction=0.02", "wandb.mode=disabled"),
    ]
    ended = train(*run, "run_dir=run")
    assert (ended.status, ended.err) == (0, "")
    assert len(updates(Path("run"))) == 2
    assert {"loss", "perplexity"} <= evaluations(Path("run"))[-1]["eval"].keys()
    assert "data.form=labels" in train(*run, "data.form=targets", "batch=uniform").message

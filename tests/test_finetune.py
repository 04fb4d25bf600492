"""The README's fine-tuning, from files to what transformers loads: on two ranks, killed, and gone on with on one."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import forking
import pytest
import tiny_language_model
import torch
from command_line import metrics, without_measurements

IMPORTED = ("with_transformers",)
COMMAND = [
    *("-m", "distaccum.train", "experiment=finetune", "model.name_or_path=llama", "data.files=chats.jsonl"),
    *("data.max_length=48", "data.evaluation_fraction=0.2", "batch.global_batch_size=8", "batch.measure_costs=false"),
    *("batch.micro_batch_size=3", "train.epochs=3", "optim.lr=3e-3", "precision=fp64", "wandb.mode=disabled"),
    *("model.gradient_checkpointing=true", "task.sample_tokens=8", "checkpoint.every_updates=4"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finetune")
    tiny_language_model.write_model(path / "llama")
    tiny_language_model.write_chats(path / "chats.jsonl", 100)
    return path


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> forking.Ended:
    return forking.run(*COMMAND, "run_dir=whole", ranks=2, folder=folder, imported=IMPORTED)


def evaluations_of(run: Path) -> list[dict[str, float]]:
    return [line["eval"] for line in metrics(run) if "eval" in line]


def test_what_is_seen(folder: Path, unbroken: forking.Ended) -> None:
    assert unbroken.status == 0, unbroken.err
    assert re.search(r"train data: 80 samples, [\d,]+ tokens, of which the loss counts [\d,]+", unbroken.out)
    lines = metrics(folder / "whole")
    evaluations = evaluations_of(folder / "whole")
    assert len(evaluations) == 3
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.2
    for found in evaluations:
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-9)
    for line in lines:
        if "eval" not in line:
            assert line["metrics"]["perplexity"] == pytest.approx(math.exp(line["loss"]), rel=1e-9)
    assert len(re.findall(r"^sample: <\|user\|>What colour has .* → ", unbroken.out, re.MULTILINE)) == 3


def test_transformers_loads_what_is_left(folder: Path, unbroken: forking.Ended) -> None:
    """The weights that the run ended with: their loss on the evaluation data is the run's, by transformers alone."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.float64)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert loss_of(model, folder / "whole") == pytest.approx(evaluations_of(folder / "whole")[-1]["loss"], rel=1e-6)


def loss_of(model: Any, run: Path) -> float:
    """The loss on a run's evaluation data by transformers alone, with the tokenizer that the run has left."""
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(run)
    assert tokens.chat_template == tiny_language_model.MARKED_TEMPLATE
    losses, counted = 0.0, 0
    held_out = [0, *(index for index in range(1, 100) if is_held_out(index))]
    chats = [json.loads(line) for line in (run.parent / "chats.jsonl").read_text().splitlines()]
    for index in held_out:
        made = tokens.apply_chat_template(
            chats[index]["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids, marks = made["input_ids"][:, :48], torch.as_tensor(made["assistant_masks"])[..., :48].bool().reshape(1, -1)
        labels = ids.where(marks, -100)
        count = int((labels[:, 1:] != -100).sum())
        losses += float(model(input_ids=ids, labels=labels).loss.detach()) * count
        counted += count
    return losses / counted


def is_held_out(index: int) -> bool:
    import zlib

    return zlib.crc32(str(index).encode()) < 0.2 * 2**32


def test_a_killed_run_goes_on_on_one_rank(folder: Path, unbroken: forking.Ended) -> None:
    """With its losses in chunks, which are those of whole logits."""
    command = (*COMMAND, "run_dir=killed", "task.chunked_loss=true")
    running = forking.start(*command, ranks=2, folder=folder, imported=IMPORTED)
    file = folder / "killed" / "metrics.jsonl"
    while running.poll() is None and not (file.exists() and file.read_text().count("\n") > 8):
        time.sleep(0.02)
    running.kill()
    running.wait()
    before = len(metrics(folder / "killed"))
    assert before < len(metrics(folder / "whole")), "it had ended by itself"
    ended = forking.run(*command, folder=folder, imported=IMPORTED)
    assert ended.status == 0, ended.err
    assert "ranks: 2 → 1" in ended.out
    whole, parts = ([without_measurements(line) for line in metrics(folder / name)] for name in ("whole", "killed"))
    assert len(whole) == len(parts)
    for wanted, found in zip(whole, parts, strict=True):
        assert found.keys() == wanted.keys()
        assert found.get("eval", found)["loss"] == pytest.approx(wanted.get("eval", wanted)["loss"], rel=1e-12)
        assert found.get("grad_norm", 0) == pytest.approx(wanted.get("grad_norm", 0), rel=1e-9)


def test_no_rank_needs_to_hold_all_of_it(folder: Path, unbroken: forking.Ended) -> None:
    """Built without memory from the configuration, sharded, and its weights read by parts: the same first update."""
    deferred = ["model.from_config=true", "model.init_on_meta=true", "model.init_from=llama"]
    more = ["strategy=fsdp", *deferred, "run_dir=sharded", "train.max_updates=1", "train.epochs=null"]
    ended = forking.run(*COMMAND, *more, ranks=2, folder=folder)
    assert ended.status == 0, ended.err
    found, wanted = (metrics(folder / name)[0] for name in ("sharded", "whole"))
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-12)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-9)


def test_it_is_evaluated(folder: Path, unbroken: forking.Ended) -> None:
    ended = forking.run("-m", "distaccum.evaluate", "whole", folder=folder, imported=IMPORTED)
    assert ended.status == 0, ended.err
    last = evaluations_of(folder / "whole")[-1]
    row = ended.out.splitlines()[-1].split()
    assert [float(number) for number in row[-3:]] == pytest.approx(
        [last[name] for name in ("loss", "perplexity", "accuracy")], rel=1e-3
    )

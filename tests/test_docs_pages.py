"""The programs and classes on the pages about batches, optimizers, data and observers run as they are shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, Ended
from launching import ROOT

from distaccum.data import Shards, Stream

MARK = "<!-- run by tests/test_docs_pages.py -->\n```python\n"


def _blocks(page: str) -> list[str]:
    """Returns the blocks of a page that this file runs."""
    return re.findall(rf"{re.escape(MARK)}(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


def _block(page: str, having: str = "") -> str:
    (found,) = [block for block in _blocks(page) if having in block]
    return found


def test_the_loop_with_growing_windows(capsys: pytest.CaptureFixture[str]) -> None:
    exec(_block("batches.md"), {})
    printed = re.findall(r"(\d+) samples, loss ([\d.]+)", capsys.readouterr().out)
    sizes, losses = [int(size) for size, _ in printed], [float(loss) for _, loss in printed]
    assert sizes[:4] == [32, 54, 76, 99]
    assert max(sizes) == 256
    assert losses[-1] < losses[0]


def test_the_schedule_and_the_factory_of_groups() -> None:
    schedule, groups = _blocks("optimizers.md")
    exec(schedule, {})
    exec(groups, {})


def test_objects_are_read() -> None:
    exec(_block("sources.md", "open_file"), {})


def test_a_stream_has_windows(tmp_path: Path) -> None:
    exec(_block("sources.md", "import Stream"), {})
    (tmp_path / "part-0.bin").write_bytes(bytes(range(20)))
    names: dict[str, Any] = {}
    exec(_block("sources.md", "open_shard"), names)
    stream = Stream(Shards(str(tmp_path / "part-*.bin"), names["open_shard"]), shuffle=False)
    assert stream.samples_of_epoch(0, [1, 4]) == [bytes(range(4, 8)), bytes(range(16, 20))]


def test_the_dataset_and_the_observers_are_found_by_name(
    train: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [_block("data.md", "class Points"), *_blocks("observing.md")]
    (tmp_path / "documented_project.py").write_text("\n\n".join(blocks))
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save(torch.randn(2, 1, 8, 8), "inputs.pt")
    ended = train(
        *(entry for entry in TINY if not entry.startswith(("data", "model"))),
        "data=custom",
        "data.train._target_=documented_project.Points",
        "+data.train.count=200",
        "+data.evaluation._target_=documented_project.Points",
        "+data.evaluation.count=20",
        "model=mlp",
        "batch.global_batch_size=50",
        "+observers.losses._target_=documented_project.PrintLoss",
        "+observers.losses.every=2",
        "+observers.shown._target_=documented_project.ShowPredictions",
        "+observers.shown.path=inputs.pt",
        "run_dir=documented",
    )
    assert ended.status == 0, ended
    assert "update 2: loss " in ended.out
    assert "update 1: loss " not in ended.out
    assert re.search(r"^after update 3: \[\d, \d\]$", ended.out, re.MULTILINE)

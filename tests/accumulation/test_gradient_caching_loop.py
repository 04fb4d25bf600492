"""The own loop with a loss over pairs, of docs/examples/contrastive.md."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from documents import block_run_by
from launching import torchrun


def test_one_and_two_ranks_and_one_shot_train_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    script, whole = tmp_path / "loop.py", tmp_path / "whole.py"
    block = block_run_by("accumulation/test_gradient_caching_loop.py")
    script.write_text(block)
    whole.write_text(block.replace("micro_batch_size=16", "micro_batch_size=96"))
    outputs = []
    for path in (whole, script):
        runpy.run_path(str(path), run_name="__main__")
        outputs.append(capsys.readouterr().out)
    done = torchrun(2, str(script))
    assert done.returncode == 0, done.stderr
    outputs.append(done.stdout)
    losses = [float(loss) for output in outputs for loss in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 3
    assert losses[0] < 2.0  # log 96 = 4.6 is chance
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)
    assert "1 micro-steps" in outputs[0]
    assert "3 micro-steps, 1 sync" in outputs[2]

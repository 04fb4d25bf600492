"""The own loop of docs/own-loop.md."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from documents import block_run_by
from launching import torchrun


def _losses(output: str) -> list[str]:
    return re.findall(r"epoch \d: loss ([\d.]+)", output)


def test_it_trains_alike_on_one_and_two_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    script = tmp_path / "own_loop.py"
    script.write_text(block_run_by("accumulation/test_own_loop.py"))
    runpy.run_path(str(script), run_name="__main__")
    alone = capsys.readouterr().out
    done = torchrun(2, str(script))
    assert done.returncode == 0, done.stderr
    assert len(_losses(alone)) == 5
    assert [float(loss) for loss in _losses(done.stdout)] == pytest.approx([float(x) for x in _losses(alone)], abs=2e-4)
    assert float(_losses(alone)[-1]) < 0.6 * float(_losses(alone)[0])
    assert "0 sync" in alone
    assert "1 sync" in done.stdout

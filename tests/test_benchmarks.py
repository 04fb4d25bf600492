"""Each benchmark runs, quickly, and what it says of exactness holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from launching import ROOT

from benchmarks import common
from benchmarks.emulated_hosts import why_impossible


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), "--quick", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "250"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_are_those_of_the_repositorys_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert json.loads(path.read_text())["command"].startswith("python benchmarks/"), path.name
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.chdir(tmp_path)
    for script in (tmp_path / "benchmarks" / "peers.py", "benchmarks/peers.py"):
        monkeypatch.setattr(sys, "argv", [str(script), "--write"])
        common.write("peers", "?", [])
        record = json.loads((tmp_path / "benchmarks" / "results" / "peers.json").read_text())
        assert record["command"] == "python benchmarks/peers.py --write"


def test_exactness() -> None:
    assert "distaccum" in _run("exactness.py")
    rows = json.loads(Path(ROOT, "benchmarks/results/exactness.json").read_text())["rows"]
    for row in rows:
        assert (row["relative error of the update"] < 1e-12) == (row["method"] == "distaccum")


def test_sync() -> None:
    assert "ratio" in _run("sync.py")


def test_noise_scale() -> None:
    assert "measured / plain" in _run("noise_scale.py")


def _table(output: str) -> list[dict[str, str]]:
    """The rows of a benchmark's table."""
    (header,) = (line for line in output.splitlines() if line.startswith("┃"))
    names = [cell.strip() for cell in header.strip("┃").split("┃")]
    rows = [line.strip("│").split("│") for line in output.splitlines() if line.startswith("│")]
    return [dict(zip(names, map(str.strip, row), strict=True)) for row in rows]


def _need_peers() -> None:
    missing = [name for name in ("accelerate", "lightning", "transformers") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs the extra `bench`: {', '.join(missing)} not installed")


def test_peers() -> None:
    _need_peers()
    rows = _table(_run("peers.py"))
    assert {row["ranks"] for row in rows} == {"1", "2"}
    wrong = {(row["contender"], kind) for row in rows for kind in ("ragged", "unequal") if float(row[kind]) > 1e-12}
    means_of_means = ("hand-written loop", "Accelerate", "Fabric", "Lightning Trainer")
    assert wrong == {(name, kind) for name in means_of_means for kind in ("ragged", "unequal")}
    assert all(float(row["error: full"]) < 1e-12 for row in rows)


def test_padding() -> None:
    _need_peers()
    rows = _table(_run("padding.py"))
    assert all(float(row["error of the update"]) < 1e-12 for row in rows)
    computed = {(row["ranks"], row["contender"]): float(row["tokens computed / real"]) for row in rows}
    for ranks in ("1", "2"):
        assert computed[ranks, "distaccum, by_length"] < 0.6 * computed[ranks, "distaccum, uniform"]
    assert computed["1", "distaccum, uniform"] == computed["1", "Transformers, dynamic"]


def test_gpu_refuses_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for arguments, said in (([], "torch finds none"), (["--device", "cpu", "--write"], "say nothing here")):
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_gpu_at_a_small_size_on_a_cpu() -> None:
    said = _run("gpu.py", "--device", "cpu", "--backend", "aot_eager")
    loops, _, memory = said.partition("Memory ")
    rows = [row for row in _table(loops) if row["loop"] == "distaccum"]
    assert [row["compile"] for row in rows] == ["false", "true"]
    assert {row["host waits in micro-steps"] for row in rows} == {"0"}
    found, recovered = _table(memory)
    assert found["micro-batch"] == "5", "memory runs out above"
    assert "2 times cut smaller" in recovered["what"]
    assert float(recovered["what"].rpartition(" ")[2]) < 1e-3, "bfloat16 sums in another order"


def test_slow_link() -> None:
    if reason := why_impossible():
        pytest.skip(reason)
    sent = {(row["link"], row["K"], row["sync"]): float(row["MB on the wire"]) for row in _table(_run("slow_link.py"))}
    for link in ("100mbit", "1gbit"):
        one = sent[link, "1", "no_sync"]
        assert sent[link, "8", "no_sync"] == pytest.approx(one, rel=0.1)
        assert sent[link, "8", "every micro-step"] == pytest.approx(8 * one, rel=0.1)
        assert sent[link, "8", "no_sync, bf16"] == pytest.approx(one / 2, rel=0.15)
        assert sent[link, "8", "no_sync, PowerSGD"] < one / 20


def test_checkpoint() -> None:
    shown = _run("checkpoint.py")
    assert all(way in shown for way in ("copy in memory", "asynchronous", "synchronous", "torch.save"))


def test_unequal_ranks() -> None:
    assert "of the ideal" in _run("unequal_ranks.py")

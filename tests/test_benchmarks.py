"""Each benchmark runs with --quick, shows what it promises, and what it says of exactness holds."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import forking
import pytest
import torch
from launching import ROOT

from benchmarks import common, gpu_profile

BENCHMARKS = ROOT / "benchmarks"
HELPERS = {"common", "emulated_hosts", "gpu_memory", "gpu_model", "gpu_profile", "peers_contenders", "start_phases"}
ON_A_GPU = ("gpu", "gpu_peers", "gpu_text")
"""Run by gpu.sh."""
PEERS = {"accelerate", "lightning", "transformers"}
NEEDED = {
    "exactness_of_trainers": PEERS | {"trl"},
    "finetune": {"transformers"},
    "loading": {"datasets", "litdata", "webdataset"},
    "padding": PEERS,
    "peers": PEERS,
    "picture_of_segmentation": {"matplotlib"},
}
"""Packages of the extra `bench` that a benchmark can't do without."""

Rows = list[dict[str, str]]
"""Of a table, as it is printed."""


def exactness(rows: Rows) -> None:
    assert len(rows) == 3 * 2 * 2, "K, methods, windows"
    for row in [*rows, *json.loads((common.RESULTS / "exactness.json").read_text())["rows"]]:
        assert (float(row["relative error of the update"]) < 1e-12) == (row["method"] == "distaccum")


def exactness_of_trainers(rows: Rows) -> None:
    recipes = {"Accelerate, recipe", "Transformers Trainer, count", "Transformers' Bert, recipe"}
    right = {"distaccum", "TRL SFTTrainer", *recipes}
    for row in [*rows, *json.loads((common.RESULTS / "exactness_of_trainers.json").read_text())["rows"]]:
        wrong = "wrong factor" if row["trainer"] == "Transformers' Bert" else "mean of means"
        is_right = row["trainer"] in right
        assert (row["same update"], row["likeliest cause"] or None) == (("yes", None) if is_right else ("no", wrong))


def restart(rows: Rows) -> None:
    assert [row["launcher"] for row in rows] == ["distaccum.launch"]
    for row in rows:
        assert 0 < float(row["other rank ended"]) < float(row["checkpoint found"]) < float(row["next update"])


def sync(rows: Rows) -> None:
    assert [row["K"] for row in rows] == ["1", "2", "4", "8", "16"]
    for row in rows:
        assert float(row["every: MB/update"]) == pytest.approx(8.4 * int(row["K"]), rel=0.01)
        assert float(row["no_sync: MB/update"]) == pytest.approx(8.4, rel=0.01)


def single_step(rows: Rows) -> None:
    assert [row["strategy"] for row in rows] == ["ddp", "fsdp"]
    assert all(float(row["distaccum / plain"]) > 0 for row in rows)


def noise_scale(rows: Rows) -> None:
    assert [row["ranks"] for row in rows] == ["1"] * 6 + ["2"] * 6
    assert {row["model"] for row in rows} == {"MLP, digits", "CNN, digits", "GPT, 128 tokens"}
    assert all(float(row["measured / plain"]) > 0 for row in rows)


def peers(rows: Rows) -> None:
    assert [row["ranks"] for row in rows] == ["1"] * 6 + ["2"] * 6
    wrong = {(row["contender"], kind) for row in rows for kind in ("ragged", "unequal") if float(row[kind]) > 1e-12}
    means_of_means = ("hand-written loop", "Accelerate", "Fabric", "Lightning Trainer")
    assert wrong == {(name, kind) for name in means_of_means for kind in ("ragged", "unequal")}
    assert all(float(row["error: full"]) < 1e-12 for row in rows)


def padding(rows: Rows) -> None:
    assert all(float(row["error of the update"]) < 1e-12 for row in rows)
    computed = {(row["ranks"], row["contender"]): float(row["tokens computed / real"]) for row in rows}
    assert len(computed) == 8
    for ranks in ("1", "2"):
        assert computed[ranks, "distaccum, by_length"] < 0.6 * computed[ranks, "distaccum, uniform"]
    assert computed["1", "distaccum, packed"] == computed["2", "distaccum, packed"] == 1
    assert computed["1", "distaccum, uniform"] == computed["1", "Transformers, dynamic"]
    assert computed["1", "Transformers, grouped"] < computed["1", "Transformers, dynamic"]


def finetune(rows: Rows) -> None:
    ours, theirs = rows
    assert ours["contender"] == "distaccum"
    assert float(ours["error of the weights"]) < 1e-12 < float(theirs["error of the weights"])


def gpu(loops: Rows, memory: Rows, compiled: Rows) -> None:
    rows = [row for row in (*loops, *compiled) if row["loop"] == "distaccum"]
    assert [row["compile"] for row in rows] == ["false", "true"]
    assert {row["host waits in micro-steps"] for row in rows} == {"0"}
    assert {row["copies beside computing"] for row in rows} == {"-"}, "nothing is copied on a CPU"
    predicted, found, recovered = memory
    assert abs(float(predicted["figure"])) < 5
    assert found["micro-batch"] == "5", "memory runs out above"
    assert float(found["figure"]) == 1
    assert "2 times cut smaller" in recovered["what"]
    assert float(recovered["figure"]) < 1e-3


def gpu_peers(rows: Rows) -> None:
    contenders = ["hand-written loop", "distaccum", "Accelerate", "Fabric", "Transformers Trainer"]
    assert [row["contender"] for row in rows] == contenders


def gpu_text(rows: Rows) -> None:
    assert [row["windows cut"] for row in rows] == ["random", "by_length", "flash", "measured", "packed"]
    assert float(rows[1]["padding"]) < 0.15 < 0.3 < float(rows[0]["padding"])
    assert float(rows[4]["padding"]) == 0


def slow_link(rows: Rows, nodes: Rows) -> None:
    sent = {(row["K"], row["sync"]): float(row["MB on the wire"]) for row in rows}
    assert len(sent) == 2 * 4, "K, ways"
    one = sent["1", "no_sync"]
    assert sent["8", "no_sync"] == pytest.approx(one, rel=0.1)
    assert sent["8", "every micro-step"] == pytest.approx(8 * one, rel=0.1)
    assert sent["8", "no_sync, bf16"] == pytest.approx(one / 2, rel=0.15)
    assert sent["8", "no_sync, PowerSGD"] < one / 20
    between = {(row["K"], row["placement"]): float(row["MB between hosts"]) for row in nodes}
    for way in ("fsdp, node", "fsdp, node, gathered once", "fsdp, whole in a host, gathered once"):
        assert between["1", way] == pytest.approx(one, rel=0.1), "each half of the gradients once"
        assert between["4", way] == pytest.approx(one, rel=0.1)
    assert between["4", "ddp, no_sync"] == pytest.approx(1.5 * one, rel=0.1)


def tuning(rows: Rows) -> None:
    places = ["suggested against configured, on this machine", "2 hosts, 1gbit"]
    assert [row["what"] for row in rows] == places[: len(rows)]
    assert all(float(row["s/update"]) > 0 for row in rows)


def memory(rows: Rows, steps: Rows) -> None:
    published = json.loads((common.RESULTS / "memory.json").read_text())["rows"]
    placements = {row["placement"] for row in published if "placement" in row}
    assert {(row["placement"], row["K"]) for row in rows} == set(itertools.product(placements, ("1", "4")))
    assert all(abs(float(row["error %"])) < 5 for row in rows)
    taken = {(row["optimizer"], row["implementation"]): float(row["temporaries MB"]) for row in steps}
    assert all((size <= 25 * 2**20 / 1e6) == (way == "auto") for (_, way), size in taken.items())


def checkpoint(rows: Rows) -> None:
    ways = {"copy in memory", "asynchronous", "synchronous", "torch.save"}
    assert {(row["disk"], row["way"]) for row in rows} >= {("as it is", way) for way in ways}
    assert len(rows) % len(ways) == 0


def states_in_memory(rows: Rows) -> None:
    assert [row["memory_every_updates"] for row in rows] == ["null", "10", "1"] * 3
    assert all(float(row["s per update"]) > 0 for row in rows)


def unequal_ranks(rows: Rows) -> None:
    cases = [(row["ranks"], row["3 x slower"], row["batch.balance"]) for row in rows]
    assert cases == [("2", "1", balance) for balance in ("even", "speed")]
    assert {sum(map(int, row["shares"].split(" + "))) for row in rows} == {768}


def scaling(rows: Rows) -> None:
    assert [row["at"] for row in rows if row["what"] == "cut by length"][-1] == "window 4096, 256 ranks"
    assert {row["what"] for row in rows} > {"window bounds", "sums, an update", "checkpoint, save()"}
    assert [row["at"] for row in rows if row["what"] == "window bounds"][-1] == "10^9 samples"
    mapped = {row["at"]: float(row["MB"]) for row in rows if row["what"] == "lengths in a file"}
    assert mapped["10^7 samples"] < 20, "copied as int64 it would be 80"


def loading(rows: Rows) -> None:
    files = ["images, folders", "images, tar", "tokens", "rows, Parquet"]
    assert list(dict.fromkeys(row["files"] for row in rows)) == files
    plans = {(row["files"], row["workers"]): float(row["plan %"]) for row in rows if row["loader"] == "distaccum"}
    assert set(plans) == set(itertools.product(files, ("0", "1")))
    assert all(share < 2 for (name, _), share in plans.items() if "images" in name)
    peers = {row["loader"] for row in rows if row["files"] == "images, folders"}
    assert peers == {"distaccum", "DataLoader", "DataLoader again", "datasets", "litData", "WebDataset"}


def start(phases: Rows, commands: Rows) -> None:
    names = [row["phase"] for row in phases]
    assert {"import torch", "configuration", "data and task", "optimizer", "evaluations"} < set(names)
    assert names.index("import torch") < names.index("first micro-step") < names.index("leaving the ranks")
    first_update, whole, *others = (float(row["s"]) for row in commands)
    assert 0 < first_update < sum(float(row["rank 0 s"]) for row in phases)
    assert whole > 0  # of another run
    assert others


def soak(rows: Rows, trends: Rows) -> None:
    assert {row["phase"] for row in rows} == {row["phase"] for row in trends} == {"training", "streams", "restarts"}
    published = json.loads((common.RESULTS / "soak.json").read_text())["rows"]
    assert {row["flat"] for row in published if "flat" in row} == {"yes"}


def no_table() -> None:
    """The pictures print none."""


CHECKS: dict[str, Callable[..., None]] = {
    **{
        check.__name__: check
        for check in (exactness, exactness_of_trainers, sync, noise_scale, peers, padding, slow_link, tuning)
    },
    **{check.__name__: check for check in (finetune, memory, checkpoint, unequal_ranks, scaling, single_step, loading)},
    "restart": restart,
    "start": start,
    "soak": soak,
    "states_in_memory": states_in_memory,
    "picture_of_a_run": no_table,
    "picture_of_segmentation": no_table,
}


def _run(name: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = (str(BENCHMARKS / f"{name}.py"), *arguments)
    imported = ("with_transformers",) if "transformers" in NEEDED.get(name, ()) else ()
    ended = forking.run(*command, folder=cwd, imported=imported)
    return subprocess.CompletedProcess(command, ended.status, ended.out, ended.err)


def _tables(output: str) -> list[Rows]:
    tables = []
    for is_table, lines in itertools.groupby(output.splitlines(), lambda line: "│" in line):
        if is_table:
            names, *rows = ([cell.strip() for cell in line.split("│")] for line in lines)
            tables.append([dict(zip(names, row, strict=True)) for row in rows])
    return tables


@pytest.mark.parametrize("name", sorted({path.stem for path in BENCHMARKS.glob("*.py")} - HELPERS - {*ON_A_GPU}))
def test_a_quick_run(name: str, tmp_path: Path) -> None:
    if missing := [package for package in NEEDED.get(name, ()) if find_spec(package) is None]:
        pytest.skip(f"needs the extra `bench`: {', '.join(sorted(missing))} not installed")
    picture = tmp_path / "picture.svg"
    arguments = (str(picture),) if "picture" in name else ()
    done = _run(name, "--quick", *arguments, cwd=tmp_path)
    if "hosts can't be emulated here" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"This takes about \d+ (seconds|minutes?) on ", done.stdout)
    tables = _tables(done.stdout)
    CHECKS[name](*tables)
    if "picture" in name:
        drawn = picture.read_text(encoding="utf-8")
        assert "<svg" in drawn
        assert len(drawn) > 5_000
    else:
        published = json.loads((common.RESULTS / f"{name}.json").read_text())["rows"]
        assert {tuple(row) for table in tables for row in table} == {tuple(row) for row in published}


def test_rows_are_printed_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    def rows() -> Iterator[common.Row]:
        yield {"way": "a", "seconds": 0.5, "of all": None}
        assert capsys.readouterr().out.splitlines()[-1].split() == ["a", "│", "0.5", "│"]
        yield {"way": "a way of 26 letters or more", "seconds": 123.456, "of all": 1}

    found = common.show("Title", rows())
    assert [row["seconds"] for row in found] == [0.5, 123.456]
    assert capsys.readouterr().out == f"{'a way of 26 letters or more':<21} │       123 │         1\n"


def test_ranks_send_rows_and_one_that_fails_ends_the_benchmark(capfd: pytest.CaptureFixture[str]) -> None:
    code = "print('of a library', flush=True); print('{\"K\": 1}', flush=True); raise SystemExit(3)"
    rows = common.rows_of([sys.executable, "-c", code], [sys.executable, "-c", "print('{\"K\": 2}')"])
    assert next(rows) == {"K": 1}
    with pytest.raises(SystemExit, match="exit status 3 of"):
        next(rows)
    assert capfd.readouterr() == ("", "")


def test_commands_are_those_of_the_repositorys_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in common.RESULTS.glob("*.json"):
        assert json.loads(path.read_text())["command"].startswith("python benchmarks/"), path.name
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.chdir(tmp_path)
    for script in (tmp_path / "benchmarks" / "peers.py", "benchmarks/peers.py"):
        monkeypatch.setattr(sys, "argv", [str(script), "--write"])
        common.write("?", [])
        record = json.loads((tmp_path / "benchmarks" / "results" / "peers.json").read_text())
        assert record["command"] == "python benchmarks/peers.py --write"
        assert record["question"] == "?"


def test_all_that_is_for_a_gpu_runs_on_a_cpu() -> None:
    if missing := [package for package in PEERS if find_spec(package) is None]:
        pytest.skip(f"needs the extra `bench`: {', '.join(sorted(missing))} not installed")
    done = _gpu("--device", "cpu", "--quick", "--skip-tests")
    assert done.returncode == 0, done.stdout + done.stderr
    loops, memory, compiled, contenders, text = _tables(done.stdout)
    gpu(loops, memory, compiled)
    gpu_peers(contenders)
    gpu_text(text)


def test_gpu_refuses_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for arguments, said in (([], "torch finds none"), (["--device", "cpu", "--write"], "say nothing here")):
        done = _run("gpu", *arguments)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_a_part_that_fails_on_a_gpu_is_named_and_the_others_run(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *gpu_peers*) exit 3;; *pytest*) sleep 0;; *) echo "ran $1";; esac\n')
    python.chmod(0o755)
    done = _gpu("--device", "cpu", "--quick", PYTHON=str(python))
    assert done.returncode == 1
    assert done.stdout.endswith("ran benchmarks/gpu_text.py\n\nfailed: peers (exit status 3)\n")
    assert "ran benchmarks/gpu.py" in done.stdout
    assert "pytest -m gpu -n 0 -q tests/" in done.stdout
    assert _gpu("--device", "tpu").returncode == 2


def _gpu(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BENCHMARKS / "gpu.sh"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=forking.environment(**{"PYTHON": forking.python(), **environment}),
    )


def test_copies_are_beside_what_computes_meanwhile() -> None:
    def event(category: str, start: float, duration: float, name: str = "", **arguments: int) -> dict[str, Any]:
        return {"cat": category, "ts": start, "dur": duration, "name": name, "args": arguments}

    events = [
        event("kernel", 0, 10),
        event("kernel", 5, 7),
        event("kernel", 20, 10),
        event("cpu_op", 12, 8),
        event("gpu_user_annotation", 0, 100),
        event("gpu_memcpy", 8, 8, "Memcpy HtoD (Pinned -> Device)", bytes=10**5),
        event("gpu_memcpy", 22, 4, "Memcpy HtoD (Pinned -> Device)", bytes=10**5),
        event("gpu_memcpy", 13, 2, "Memcpy HtoD (Pageable -> Device)", bytes=8),
        event("gpu_memcpy", 13, 2, "Memcpy DtoH (Device -> Pageable)", bytes=10**5),
        {"ph": "M", "name": "process_name"},
    ]
    copies, kernels = gpu_profile.copies_and_kernels(events)
    assert gpu_profile.share_beside(copies, kernels) == pytest.approx((4 + 4) / (8 + 4))
    assert math.isnan(gpu_profile.share_beside([], kernels))

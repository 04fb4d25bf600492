"""`compile=true`, with a backend that generates no code, as generating it takes half a minute."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command_line import TINY, Ended, updates
from safetensors import safe_open

from distaccum.config.compose import compose
from distaccum.errors import UserError
from distaccum.runtime.compilation import CompileClock, resolve_compilation

Train = Callable[..., Ended]
CPU = torch.device("cpu")
RAGGED = [*TINY, "data.num_samples=70", "train.max_updates=12", "precision=fp64", "batch.micro_batch_size=4"]
COMPILED = ["compile=true", "compile_backend=aot_eager"]


@pytest.fixture(autouse=True)
def _as_new() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_run_is_the_same_run_and_its_warm_up_is_told_apart(train: Train) -> None:
    plain, compiled = train(*RAGGED, "run_dir=plain"), train(*RAGGED, *COMPILED, "run_dir=compiled")
    assert plain.status == compiled.status == 0, compiled.err
    one, other = updates(Path("plain")), updates(Path("compiled"))
    for key in ("loss", "grad_norm", "samples", "micro_steps"):
        assert [line[key] for line in other] == pytest.approx([line[key] for line in one], rel=1e-12)
    compiling = [line["update"] for line in other if "compile_seconds" in line]
    # Once for the first shape, and once more for all others, in the epoch's ragged window.
    assert compiling[0] == 1
    assert 1 < len(compiling) <= 3
    assert f"warm-up        {len(compiling)} updates took " in compiled.out
    assert "warm-up" not in plain.out
    measured = [line for line in other if "compile_seconds" not in line]
    speed = sum(line["samples_per_second"] * line["update_seconds"] for line in measured) / sum(
        line["update_seconds"] for line in measured
    )
    said = next(line for line in compiled.out.splitlines() if line.startswith("speed"))
    assert float(said.split()[1].replace(",", "")) == pytest.approx(speed, rel=0.01)


def test_names_are_those_of_the_model(train: Train) -> None:
    assert train(*RAGGED, *COMPILED, "run_dir=run").status == 0
    with safe_open("run/model.safetensors", "pt") as file:
        assert set(file.keys()) == {f"layers.{layer}.{name}" for layer in (1, 4) for name in ("weight", "bias")}
    manifest = json.loads(next(Path("run/checkpoints").glob("*/manifest.json")).read_text())
    assert "_orig_mod" not in json.dumps(manifest)
    # A run that was compiled goes on uncompiled.
    longer = [*RAGGED, "run_dir=run", "train.max_updates=14"]
    assert train(*longer).status == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["strategy=dp"], "strategy=dp does not support compile=true"),
        (["compile_backend=indcutor"], "compile_backend=indcutor: torch has no such backend. Choose one of: "),
    ],
)
def test_what_cannot_be_compiled_is_refused(train: Train, overrides: list[str], said: str) -> None:
    assert train(*TINY, "compile=true", *overrides).message.startswith(said)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler, and no-such-compiler is not there"):
        resolve_compilation("inductor", None, CPU)
    assert resolve_compilation("aot_eager", None, CPU).backend == "aot_eager"


def test_a_check_is_of_the_model_as_it_is() -> None:
    with pytest.raises(UserError, match="check examines the model as it is, without compile=true"):
        compose(["compile=true"], "check")


def test_the_clock_counts_updates_only() -> None:
    clock = CompileClock()
    with clock.listening():
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        resolve_compilation("aot_eager", None, CPU).apply(model)
        with clock.counting():
            model(torch.ones(2, 2)).sum().backward()
        assert clock.has_news()
        assert not clock.has_news()
        assert clock.take() > 0
        model(torch.ones(3, 2)).sum().backward()
        assert not clock.has_news()
        assert clock.take() == 0
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_what_is_used_of_dynamo_is_there() -> None:
    from torch._dynamo.callback import callback_handler

    for kind in ("register_start", "register_end", "remove_start", "remove_end"):
        assert hasattr(callback_handler, f"{kind}_callback"), f"torch {torch.__version__} has no {kind}_callback"

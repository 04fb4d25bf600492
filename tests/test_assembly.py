from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import files_below
from omegaconf import OmegaConf

from distaccum.assembly import as_plain, check_same_config, make_run_dir
from distaccum.choices import PrecisionName
from distaccum.entry import compose
from distaccum.errors import UserError

CONFIG = {"seed": 3, "model": {"_target_": "mine.Net", "sizes": [1, 2]}, "run_dir": None}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


# The run folder


def test_the_run_folder_holds_the_configuration() -> None:
    run_dir = make_run_dir("a/b", CONFIG)
    assert run_dir == Path("a/b")
    assert OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml")) == CONFIG
    assert files_below(Path()) == {"a/b/config.yaml"}


@pytest.mark.parametrize("text", ["a: b", "# no comment", "über", "null", "3", "${seed}", "'", "line\nbreak"])
def test_the_configuration_reads_back_as_it_was(text: str) -> None:
    run_dir = make_run_dir(None, {"wandb": {"name": text}})
    assert OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml")) == {"wandb": {"name": text}}


def test_each_run_has_a_folder_of_its_own_even_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda pattern: "now")
    assert [str(make_run_dir(None, CONFIG)) for _ in range(3)] == ["runs/now", "runs/now_2", "runs/now_3"]


def test_runs_that_start_at_once_share_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda pattern: "now")
    barrier = threading.Barrier(8)
    made: list[Path] = []

    def make() -> None:
        barrier.wait()
        made.append(make_run_dir(None, CONFIG))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8


def test_a_folder_with_results_is_refused_and_left_as_it_was() -> None:
    make_run_dir("mine", {"seed": 1})
    Path("mine/metrics.jsonl").write_text('{"update": 1}\n')
    before = {name: Path(name).read_bytes() for name in files_below(Path())}
    with pytest.raises(UserError) as refused:
        make_run_dir("mine", {"seed": 2})
    assert str(refused.value) == (
        "run_dir=mine holds the results of another run, which would be overwritten. Choose another folder, or remove "
        "that one."
    )
    assert {name: Path(name).read_bytes() for name in files_below(Path())} == before


def test_a_run_that_failed_before_its_first_update_can_be_started_again() -> None:
    make_run_dir("mine", {"seed": 1})
    make_run_dir("mine", {"seed": 2})
    assert Path("mine/config.yaml").read_text() == "seed: 2\n"


def test_files_of_others_in_the_folder_are_left_alone() -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    make_run_dir("mine", CONFIG)
    assert Path("mine/notes.txt").read_text() == "keep"


@pytest.mark.parametrize("run_dir", ["file", "file/run", "file/a/b"])
def test_a_folder_that_cannot_be_made_is_refused(run_dir: str) -> None:
    Path("file").write_text("not a folder")
    with pytest.raises(UserError, match=rf"^the run folder {run_dir} can't be written: .+\. Choose another with run_"):
        make_run_dir(run_dir, CONFIG)
    assert Path("file").read_text() == "not a folder"


def test_a_runs_folder_that_cannot_be_made_is_refused() -> None:
    Path("runs").write_text("not a folder")
    with pytest.raises(UserError, match=r"^the run folder runs/.+ can't be written: Not a directory\. Choose another"):
        make_run_dir(None, CONFIG)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"^run_dir is empty\. Name a folder, or leave run_dir out"):
        make_run_dir("", CONFIG)
    assert files_below(Path()) == set()


# Plain configurations


class Colour(Enum):
    red = 1


@dataclass
class Inner:
    colour: Colour = Colour.red
    numbers: list[int] = field(default_factory=lambda: [1, 2])


def test_as_plain() -> None:
    found = as_plain({"a": Inner(), "b": [Inner(), 2.5, None, True], "c": {"d": "text"}})
    inner = {"colour": "red", "numbers": [1, 2]}
    assert found == {"a": inner, "b": [inner, 2.5, None, True], "c": {"d": "text"}}


def test_as_plain_takes_a_whole_configuration() -> None:
    found = as_plain(compose(["precision=bf16", "+observers.mine._target_=a.B"]))
    assert found["precision"] == {"name": PrecisionName.bf16.name}
    assert found["observers"] == {"mine": {"_target_": "a.B"}}
    assert found["data"]["train"] == {"_target_": "distaccum.data.Digits", "split": "train"}
    OmegaConf.to_yaml(OmegaConf.create(found))


# Ranks with different configurations; tests/distributed has real ones


def _ranks(*flat: dict[str, Any]) -> Any:
    return SimpleNamespace(gather=lambda own: [own, *flat])


def test_equal_configurations_pass() -> None:
    check_same_config(_ranks({"seed": 3, "model._target_": "mine.Net", "model.sizes": [1, 2], "run_dir": None}), CONFIG)


def test_nan_is_the_same_on_all_ranks() -> None:
    check_same_config(_ranks({"optim.lr": float("nan")}), {"optim": {"lr": float("nan")}})


def test_different_values_are_named_with_their_ranks() -> None:
    other = {"seed": 4, "model._target_": "mine.Net", "model.sizes": [1, 2], "run_dir": None}
    same = {**other, "seed": 3}
    with pytest.raises(UserError) as refused:
        check_same_config(_ranks(same, other), CONFIG)
    assert str(refused.value) == (
        "the ranks were started with different configurations: seed is 3 on rank 0, 3 on rank 1, 4 on rank 2. Give all "
        "the same."
    )


def test_a_key_that_one_rank_lacks_is_named() -> None:
    with pytest.raises(UserError, match=r"model\.width is None on rank 0, 7 on rank 1\."):
        check_same_config(_ranks({"model.width": 7}), {})


def test_many_differences_are_counted() -> None:
    with pytest.raises(UserError, match=r": k0 is 0 on rank 0, 1 on rank 1; .*; and 3 more keys\. Give all the same\."):
        check_same_config(_ranks({f"k{i}": 1 for i in range(8)}), {f"k{i}": 0 for i in range(8)})

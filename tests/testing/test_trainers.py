"""`python -m distaccum.check --trainer` on trainers of others, alone and on two ranks."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import forking
import pytest
from documents import block_run_by

NEEDED = ("accelerate", "lightning", "trl")
missing = [package for package in NEEDED if find_spec(package) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs the extra `bench`: {missing} not installed")


def check(*words: str, **more: Any) -> forking.Ended:
    path = str(Path(__file__).parent)
    paths = ":".join([path, forking.environment()["PYTHONPATH"]])
    return forking.run("-m", "distaccum.check", *words, imported=("with_trainers",), PYTHONPATH=paths, **more)


def verdict(name: str, *words: str, **more: Any) -> dict[str, Any]:
    ended = check("--trainer", f"trainers:{name}", "--json", *words, **more)
    assert ended.status in (0, 1), ended.err
    found: dict[str, Any] = json.loads(ended.out)
    assert found["status"] == ended.status == (0 if found["equal"] else 1)
    return found


def test_right_trainers_pass(tmp_path: Path) -> None:
    found = verdict("with_accelerates_recipe")
    assert found["equal"]
    assert found["rows"][0]["sizes"] == [7, 7]
    assert all(row["worst_error"] < 1e-12 for row in found["rows"])

    (tmp_path / "my_module.py").write_text(block_run_by("testing/test_trainers.py"))
    (tmp_path / "my_project.py").write_text(
        "from datasets import Dataset\nimport trainers\n"
        "config, dataset, tokenizer = trainers.config(), Dataset.from_list(trainers.TEXTS), trainers.TOKENIZER\n"
    )
    ended = check("--trainer", "my_module:make_trainer", folder=tmp_path)
    assert ended.status == 0, ended.err
    assert ended.out.startswith("EQUAL: the update is that of the large batch, to ")
    assert "│ 6 + 6 " in ended.out


@pytest.mark.parametrize(
    ("name", "kind"),
    [("with_accelerate", "mean_of_means"), ("with_fabric", "mean_of_means"), ("classifier", "wrong_factor")],
)
def test_wrong_trainers_fail_with_their_cause(name: str, kind: str) -> None:
    found = verdict(name)
    assert found["verdict"].startswith("NOT EQUAL: the gradient is off by ")
    assert kind in [finding["kind"] for finding in found["findings"]]
    if name == "classifier":  # before clipping: after it, what is off is the clipping's epsilon
        assert found["rows"][0]["gradient_error"] > 0.99, found["rows"]


def test_a_report_of_lightning_for_people(tmp_path: Path) -> None:
    ended = check("--trainer=trainers:lightning", folder=tmp_path)
    assert ended.status == 1, ended.err
    assert ended.out.startswith("NOT EQUAL: the gradient is off by ")
    assert "because mean of means" in ended.out.splitlines()[0]
    assert "│ 6 + 6 " in ended.out
    assert "remedy: sum the losses" in ended.out
    assert list(tmp_path.iterdir()) == []
    assert verdict("lightning", "--even")["equal"]


def test_trainers_on_ranks() -> None:
    for name in ("sft", "with_accelerates_recipe"):
        found = verdict(name, ranks=2)
        assert (found["equal"], found["world_size"]) == (True, 2), found
    for name, kind in (
        ("sft_of_each_rank", "mean_of_ranks"),
        ("lightning", "mean_of_means"),
    ):
        found = verdict(name, ranks=2)
        assert [finding["kind"] for finding in found["findings"]] == [kind], found
    assert verdict("lightning", "--even", ranks=2)["equal"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainers"], "must be MODULE:FUNCTION"),
        (["no_such_module:make"], "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        (["trainers:no_such_name"], "has no attribute 'no_such_name'"),
        (["trainers:NOT_CALLABLE"], "is a int, not a function"),
        (["trainers:not_a_trainer"], "and has returned 3"),
        (["trainers:lightning_without_module"], "(trainer, module)"),
        (["trainers:lightning_on_two"], "wants 2 ranks, and there are 1"),
        (["trainers:with_fabric", "--samples", "1"], "it must be at least 2"),
        (["trainers:with_fabric", "experiment=text"], "unrecognized arguments: experiment=text"),
    ],
)
def test_bad_input_ends_with_one_message(words: list[str], said: str) -> None:
    assert said in check("--trainer", *words).message

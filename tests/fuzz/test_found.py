"""What random command lines and tampering have found, a kind at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import TINY, Ended
from torch import nn

from distaccum.checkpoints.weights import load_exported
from distaccum.config.argument_types import require_types
from distaccum.config.compose import compose
from distaccum.config.instantiate import build
from distaccum.data.rows.row_files import JsonLines
from distaccum.data.storage.files import RangeReader
from distaccum.data.tars.tar_index import tar_index
from distaccum.data.tokens.token_files import find
from distaccum.errors import UserError
from distaccum.training.run_folder import held_run_folder
from distaccum.training.task import built_task


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model=[2]", r"^model=\[2\] names no option\."),
        ("observers=null", r"^observers=null names no option\."),
        ("observers=[1.5]", r"^observers=\[1\.5\] names no option\."),
        ("=3", "^=3 has no key: write KEY=VALUE"),
        ("strategy=${seed}", r"^strategy=\$\{seed\}: "),
        ("batch={_target_: a}", r"^there is no key batch\._target_\."),
        ("train.ema=${batch}", r"^train\.ema=\$\{batch\}: it takes a section of that kind"),
        ("data.input_shape=${seed}", r"^data\.input_shape=\$\{seed\}: it takes a list"),
        ("train.swa=${train.swa}", r"^train\.swa=\$\{train\.swa\}: "),
        ('+task.class_weights._target_=""', r"task\.class_weights\._target_"),
    ],
)
def test_what_hydra_lets_through_is_one_message(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose(["data=synthetic", "model=mlp", override])


def test_options_of_hydras_may_stand_anywhere_and_wrong_ones_are_one_message(train: Callable[..., Ended]) -> None:
    shown = train("--cfg", "job", "seed=7", "--resolve", "model=mlp")
    assert shown.status == 0
    assert "seed: 7" in shown.out
    assert train("seed=1", "--nothing", "optim=sgd").message.startswith("there is no option --nothing. Write KEY=VALUE")
    assert "invalid choice: 'nothing'" in train("--info=nothing").message


def test_arguments_of_shipped_components_have_the_types_that_they_declare(train: Callable[..., Ended]) -> None:
    def message(*overrides: str) -> str:
        return train(*TINY, *overrides).message

    assert message("data.train.num_samples=many") == (
        "data.train.num_samples='many' is impossible: it takes a whole number."
    )
    assert message("data.evaluation.input_shape=[a]").startswith("data.evaluation.input_shape=['a'] is impossible")
    assert message("data.train.split=[1]") == "data.train.split=[1] is impossible: it takes a text."


def component(number: float, names: list[str] | None = None, *, pair: tuple[int, int] = (1, 2)) -> None: ...


component.__module__ = "distaccum.data"


def test_types_are_compared_as_numbers_are_meant() -> None:
    require_types(component, {"number": 1, "names": None, "pair": [1, 2], "other": object()}, "data")
    for key, value in {"number": True, "names": "abc", "pair": 3}.items():
        with pytest.raises(UserError, match=rf"^data\.{key}="):
            require_types(component, {key: value}, "data")


def refusing(size: int = 0) -> None:
    raise UserError(f"Refusing: size={size} is too small.")


def test_a_components_refusal_names_its_section() -> None:
    with pytest.raises(UserError, match=r"^model: Refusing: size=3"):
        build({"_target_": f"{__name__}.refusing", "size": 3}, "model")


def test_a_task_must_take_a_model_and_a_batch() -> None:
    with pytest.raises(UserError, match="can't be called with a model and a micro-batch"):
        built_task({"_target_": "torch.nn.Identity"})


# Tampering


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"a": 1}\n{"a": 2}\n')
    assert len(JsonLines(str(lines), None, RangeReader())) == 2
    index = next(tmp_path.glob(".distaccum/*.row-index"))
    for content in (b"", b"123", np.array([5, 3, 1], "<i8").tobytes()):
        index.write_bytes(content)
        with pytest.raises(UserError, match=f"^{re.escape(str(index))} is not as it was written"):
            JsonLines(str(lines), None, RangeReader())
    index.write_bytes(np.array([0, 1 << 60], "<i8").tobytes())
    with pytest.raises(UserError, match=r"ends at byte 18, before byte"):
        JsonLines(str(lines), None, RangeReader())


def test_a_damaged_index_of_tars_is_named(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("1.cls")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"0"))
    assert len(tar_index([str(tmp_path / "a.tar")])) == 1
    index = next(tmp_path.glob(".distaccum/*.tar-index"))
    whole = index.read_bytes()
    known = json.dumps({"extensions": ["cls"], "kinds": [[1, 1, 0]], "num_classes": 1, "bad_label": "", "ends": [5]})
    longer = whole[: whole.rindex(b'{"extensions')] + known.encode() + len(known).to_bytes(8, "little")
    for content in (b"", whole[:40], whole[:-8] + b"\xff" * 8, longer):
        index.write_bytes(content)
        with pytest.raises(UserError, match="is not as it was written"):
            tar_index([str(tmp_path / "a.tar")])


def test_devices_and_pipes_are_not_read_by_an_index(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (str(tmp_path / "pipe.jsonl"), "/dev/zero"):
        with pytest.raises(UserError, match="is no regular file"):
            JsonLines(path, None, RangeReader())


def test_a_header_of_tokens_that_is_no_python_is_one_message(tmp_path: Path) -> None:
    for text in (b"{'descr': '<u2'\xa0}", b"{'descr': '<u2', 'shape': (1,", b"(" * 5000):
        (tmp_path / "tokens.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
        with pytest.raises(UserError, match="can't be read as tokens"):
            find(str(tmp_path / "tokens.npy"), "data.files", "uint16")


def test_a_pipe_in_the_place_of_an_index_of_weights_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(UserError, match="is no regular file"):
        load_exported(nn.Linear(1, 1), str(tmp_path), "model.init_from")


def test_a_run_folder_is_not_written_through_links(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"run/logs is a link"), held_run_folder(str(tmp_path / "run"), "auto", {}):
        pass
    (tmp_path / "run" / "logs").unlink()
    (tmp_path / "here").symlink_to(tmp_path / "run")
    with held_run_folder(str(tmp_path / "here"), "auto", {}):
        pass

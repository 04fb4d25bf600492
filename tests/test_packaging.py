"""From a wheel, in an empty folder: the configuration and the templates must have come along."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from launching import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_runs_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    settings = ["data=synthetic", "model=mlp", "train.max_updates=2", "wandb.mode=disabled", "run_dir=out"]
    for command in (["distaccum.train", *settings], ["distaccum.report", "out"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=empty, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (empty / "out" / "metrics.jsonl").exists()
    page = (empty / "out" / "report.html").read_text()
    assert "finished after 2 updates" in page
    assert "--paper:" in page, "the style sheet"
    assert "pointermove" in page, "the script"


def test_the_wheel_holds_what_it_should(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    conf = {str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")}
    assert {f"distaccum/{name}" for name in conf} <= set(names)
    assert "distaccum/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "distaccum-train = distaccum.train:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_the_version_is_that_of_the_metadata(wheel: Path, tmp_path: Path) -> None:
    """Installed, and in a source tree that is not."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert wheel.name.startswith(f"distaccum-{version}-")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # -S: without the environment's own packages, where another version may be installed.
    command = [sys.executable, "-S", "-c", "import distaccum; print(distaccum.__version__, distaccum.__file__)"]
    for folder in (tmp_path, ROOT):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [version, str(folder / "distaccum" / "__init__.py")]

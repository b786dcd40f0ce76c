"""The oldest and the newest packages work, and older ones are refused in a sentence."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli_runs import failure, run
from PIL import Image

import wuerstchen_core
from wuerstchen_core import inference
from wuerstchen_core.checkpoints import load_prior
from wuerstchen_core.common import versions
from wuerstchen_core.common.versions import OLDEST, check_versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CHECKED = ("inference/test_images.py", "inference/test_editing.py", "checkpoints/test_bundle.py", "kernels")
DISK = 14e9  # bytes that an environment needs, with a torch for GPUs


def install(monkeypatch: pytest.MonkeyPatch, found: dict[str, str]) -> None:
    """Replaces the versions of installed packages; those not in `found` are not installed."""
    monkeypatch.setattr(versions, "_version", found.get)


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert wuerstchen_core.__version__ == project["version"]
    assert set(OLDEST) == set(project["dependencies"])


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert run("--version") == 0
    line, rest = capsys.readouterr().out.split("\n")
    assert f"wuerstchen {wuerstchen_core.__version__} " in line and rest == ""
    assert f"torch {torch.__version__.partition('+')[0]}" in line and "open_clip_torch" in line


def test_missing_packages_are_named_in_the_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, {"torch": "2.5.0"})
    assert run("--version") == 0 and "open_clip_torch (not installed)" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["2.4", "2.4.1+cu121", "2.10.0", "2.5.0a0+git12", "3", "v3"])
def test_versions_that_are_new_enough(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    install(monkeypatch, {"torch": number})
    check_versions()


@pytest.mark.parametrize("number", ["2.3.1", "2.3.1+cpu", "1.13.1", "2", "2.3.0a0+git12"])
def test_old_versions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: str) -> None:
    install(monkeypatch, {**OLDEST, "torch": number, "pillow": "9.4.0"})
    with pytest.raises(ValueError, match=r"2\.4.*pillow 9\.4\.0") as error:
        check_versions()
    assert f"torch {number} " in str(error.value) and "numpy" not in str(error.value)
    assert f"torch {number} " in failure(capsys, "generate", "a red apple")
    for attempt in (lambda: importlib.reload(inference), lambda: load_prior("demo")):
        with pytest.raises(ValueError, match="torch"):
            attempt()


def test_training_needs_a_newer_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install(monkeypatch, OLDEST)
    assert "torch 2.4 " in failure(capsys, "train", "prior", "--config", tmp_path / "a.toml")


@pytest.fixture(scope="module", params=["oldest", "newest"])
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The Python of a fresh environment with the oldest or the newest packages."""
    oldest = request.param == "oldest"
    if oldest and sys.version_info >= (3, 12):
        pytest.skip("the oldest packages have no wheels for this Python")
    folder = tmp_path_factory.mktemp(request.param)
    if shutil.disk_usage(folder).free < DISK:
        pytest.skip(f"an environment needs {DISK / 1e9:.0f} GB")
    environment = folder / "venv"
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = [f"{name}=={number}" for name, number in OLDEST.items()] if oldest else list(OLDEST)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "pytest", "pytest-xdist", "tomli", *packages], check=True
    )
    yield python
    shutil.rmtree(environment)


@pytest.mark.long
def test_the_oldest_and_the_newest_packages_work(python: Path, tmp_path: Path) -> None:
    command = [python, "-m", "wuerstchen_core", "generate", "a red apple on a blue background"]
    subprocess.run([*command, "--output", tmp_path / "a.png"], cwd=ROOT, check=True)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (256, 256)
    tests = [Path(__file__).parent / name for name in CHECKED]
    subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", *tests], cwd=ROOT, check=True)

"""`pip install .` gives the core alone, with its data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "__init__.py", "nodes", "wuerstchen_core")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip installs, offline; from a copy, since setuptools leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("install")
    source, target = folder / "source", folder / "target"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--target", target)
    subprocess.run([sys.executable, "-m", "pip", "install", *options, source], check=True, timeout=600)
    return target


def files(folder: Path, *patterns: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.rglob(pattern)}


def test_the_core_alone(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert "wuerstchen_core" in names
    assert all(name.startswith("wuerstchen-") and name.endswith(".dist-info") for name in names - {"wuerstchen_core"})


def test_all_code_and_the_demos_data(installed: Path) -> None:
    core = ROOT / "wuerstchen_core"
    assert files(installed / "wuerstchen_core", "*.py") == files(core, "*.py")
    data = files(core, "*.json", "*.txt", "*.toml", "*.safetensors")
    assert {"demo/artwork.json", "demo/ARTWORK-LICENSE.txt"} <= data
    assert data <= files(installed / "wuerstchen_core", "*")


def test_requirements_are_those_of_the_file(installed: Path) -> None:
    [metadata] = installed.glob("*.dist-info/METADATA")
    required = HeaderParser().parsestr(metadata.read_text(encoding="utf-8")).get_all("Requires-Dist", [])
    plain = {line for line in required if "extra ==" not in line}
    assert plain == set((ROOT / "requirements.txt").read_text(encoding="utf-8").split())


def test_it_runs_from_anywhere(installed: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "wuerstchen_core", "generate", "a cat", "--model", "nowhere"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 2 and "nowhere does not exist" in process.stderr

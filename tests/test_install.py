"""`pip install .` installs the library with its data and the command, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "__init__.py", "nodes", "tools", "wuerstchen_core")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installs offline, from a copy, since setuptools leaves files beside what it builds."""
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


def test_only_the_library_is_installed(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()} - {"wuerstchen_core", "bin", "Scripts"}
    assert all(name.startswith("wuerstchen-") and name.endswith(".dist-info") for name in names)


def test_all_code_and_data_are_installed(installed: Path) -> None:
    library = ROOT / "wuerstchen_core"
    assert files(installed / "wuerstchen_core", "*.py") == files(library, "*.py")
    data = files(library, "*.json", "*.xz", "*.txt", "*.toml", "*.safetensors")
    assert {"demo/artwork.json.xz", "demo/ARTWORK-LICENSE.txt"} <= data
    assert data <= files(installed / "wuerstchen_core", "*")


def test_requirements_are_those_of_the_file(installed: Path) -> None:
    [metadata] = installed.glob("*.dist-info/METADATA")
    required = HeaderParser().parsestr(metadata.read_text(encoding="utf-8")).get_all("Requires-Dist", [])
    plain = {line for line in required if "extra ==" not in line}
    assert plain == set((ROOT / "requirements.txt").read_text(encoding="utf-8").split())


@pytest.mark.parametrize("name", ["wuerstchen", "python -m wuerstchen_core"])
def test_the_command_runs_from_anywhere(installed: Path, tmp_path: Path, name: str) -> None:
    [script] = [path for path in installed.glob("*/wuerstchen*") if path.parent.name in ("bin", "Scripts")]
    command = [script] if name == "wuerstchen" else [sys.executable, "-m", "wuerstchen_core"]
    arguments = ("generate", "a cat", "--model", "nowhere"), ("generate", "--help")
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    failed, helped = (subprocess.run([*command, *texts], check=False, **options) for texts in arguments)
    assert failed.returncode == 2 and "nowhere" in failed.stderr
    assert helped.returncode == 0 and helped.stdout.startswith(f"usage: {name} generate ")

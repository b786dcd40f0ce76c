"""`pip install .` gives the core alone, with its data, and the requirement files say what pyproject.toml says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip installed a copy of this repository, without its dependencies."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py"):
        shutil.copy(ROOT / name, source / name)
    for name in ("wuerstchen_core", "nodes", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return target


def distribution(installed: Path) -> PathDistribution:
    return PathDistribution(next(installed.glob("wuerstchen-*.dist-info")))


def test_the_core_is_installed_alone(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert names == {"wuerstchen_core", f"wuerstchen-{distribution(installed).version}.dist-info"}


def test_every_file_of_the_core_is_installed(installed: Path) -> None:
    def files(root: Path) -> set[str]:
        everything = (root / "wuerstchen_core").rglob("*")
        return {str(path.relative_to(root)) for path in everything if path.is_file() and path.suffix != ".pyc"}

    assert files(installed) == files(ROOT)


def test_the_licences_are_installed(installed: Path) -> None:
    metadata = distribution(installed).metadata
    assert metadata["License-Expression"] == "MIT"
    assert set(metadata.get_all("License-File") or []) == {"LICENSE", "wuerstchen_core/demo/ARTWORK-LICENSE.txt"}


def test_the_installed_core_runs(installed: Path, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import wuerstchen_core, wuerstchen_core.checkpoints as c;"
        "assert wuerstchen_core.WuerstchenPipeline; sys.stdout.write(str(c.demo_path()))"
    )
    command = [sys.executable, "-I", "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout).is_relative_to(installed)


def wanted(name: str) -> list[str]:
    """The lines of a requirements file, normalised."""
    return [normal(line) for line in (ROOT / name).read_text("utf-8").splitlines() if line.strip()]


def normal(requirement: str) -> str:
    return re.sub(r"[\s\"']", "", requirement).replace("_", "-").lower()


def test_requirement_files_agree_with_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert sorted(map(normal, project["dependencies"])) == sorted(wanted("requirements.txt"))
    assert sorted(map(normal, project["optional-dependencies"]["train"])) == sorted(wanted("requirements-train.txt"))


def test_no_bound_can_move_the_torch_of_a_user() -> None:
    names = ["numpy", "open-clip-torch", "pillow", "safetensors", "torch", "torchvision"]
    assert sorted(wanted("requirements.txt")) == names

"""What pip is told: pyproject.toml and the requirement files say the same."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def normal(requirement: str) -> str:
    return re.sub(r"[\s\"']", "", requirement).replace("_", "-").lower()


def wanted(name: str) -> list[str]:
    """The lines of a requirements file, normalised."""
    return sorted(normal(line) for line in (ROOT / name).read_text("utf-8").splitlines() if line.strip())


def test_requirement_files_agree_with_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert sorted(map(normal, project["dependencies"])) == wanted("requirements.txt")
    for extra in ("train", "bench"):
        assert sorted(map(normal, project["optional-dependencies"][extra])) == wanted(f"requirements-{extra}.txt")


def test_no_bound_can_move_the_torch_of_a_user() -> None:
    names = ["numpy", "open-clip-torch", "pillow", "safetensors", "torch", "torchvision"]
    assert wanted("requirements.txt") == names

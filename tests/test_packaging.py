"""What pip installs and what ComfyUI's registry distributes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.archive import ROOT, unpacked_archive

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
REPOSITORY_ONLY = (".ci/", ".github/", "findings/", "tests/", "tools/", ".comfyignore", ".gitignore", ".pre-commit")
TEXTS = {".md", ".py", ".toml", ".txt", ".json"}


def normal(requirement: str) -> str:
    return re.sub(r"[\s\"']", "", requirement).replace("_", "-").lower()


def requirements(name: str) -> list[str]:
    """Returns the normalised lines of a requirements file."""
    return sorted(normal(line) for line in (ROOT / name).read_text("utf-8").splitlines() if line.strip())


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files that git tracks and that exist."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked_archive(tmp_path_factory.mktemp("archive"))


def test_requirement_files_agree_with_the_project() -> None:
    project = PROJECT["project"]
    assert sorted(map(normal, project["dependencies"])) == requirements("requirements.txt")
    for extra, dependencies in project["optional-dependencies"].items():
        assert sorted(map(normal, dependencies)) == requirements(f"requirements-{extra}.txt")


def test_requirements_have_no_version_bounds() -> None:
    names = ["numpy", "open-clip-torch", "pillow", "safetensors", "torch"]
    assert requirements("requirements.txt") == names


def test_tracked_names_are_ascii(tracked: list[str]) -> None:
    """comfy-cli leaves out names that git quotes: findings/comfy_node_pack_drops_quoted_names.sh."""
    assert [name for name in tracked if not name.isascii()] == []


def test_the_archive_holds_all_but_what_is_for_the_repository_alone(tracked: list[str], archive: Path) -> None:
    packed = {path.relative_to(archive).as_posix() for path in archive.rglob("*") if path.is_file()}
    assert packed == {name for name in tracked if not name.startswith(REPOSITORY_ONLY)}


def test_links_in_the_archive_lead_to_files_in_it(archive: Path) -> None:
    for page in archive.rglob("*.md"):
        text = page.read_text("utf-8")
        targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", text)
        for target in (a or b for a, b in targets):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_files_that_the_archive_names_are_in_it(tracked: list[str], archive: Path) -> None:
    """In pages, help and messages; those of the repository alone stand under its own folders."""
    texts = {path: path.read_text("utf-8") for path in archive.rglob("*") if path.suffix in TEXTS}
    named = {
        word for text in texts.values() for word in re.findall(r"[\w.-]+(?:/[\w.-]+)+|requirements[\w-]*\.txt", text)
    }
    missing = {name for name in named & set(tracked) if not (archive / name).exists()}
    assert {name for name in missing if not name.startswith(REPOSITORY_ONLY)} == set()

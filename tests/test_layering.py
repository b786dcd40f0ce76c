"""Which folder may import which, and that the core imports without ComfyUI."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACK = "pack"  # the repository's own name as a package: its folder's, which can be any

# What the modules of a folder may import besides their own folder. Nothing else is allowed.
MAY_IMPORT = {
    "wuerstchen_core.common": (),
    "wuerstchen_core.demo": ("common",),
    "wuerstchen_core.kernels": ("common",),
    "wuerstchen_core.models": ("common", "kernels"),
    "wuerstchen_core.diffusion": ("common", "models"),
    "wuerstchen_core.checkpoints": ("common", "models", "diffusion"),
    "wuerstchen_core.inference": ("common", "models", "diffusion", "checkpoints", "demo"),
    "wuerstchen_core.training": ("common", "kernels", "models", "diffusion", "checkpoints", "inference", "demo"),
    "wuerstchen_core.cli": ("common", "diffusion", "checkpoints", "inference", "training", "demo"),
    "wuerstchen_core": ("inference", "cli"),
    "nodes": ("common", "kernels", "models", "diffusion", "checkpoints", "inference", "demo"),
    "": ("nodes",),
}
HOST = ("comfy", "folder_paths", "execution", "server", "latent_preview", "node_helpers")
SLOW = ("torchvision", "open_clip", "transformers", "diffusers", "resvg_py", "webdataset", "braceexpand")
TRAINERS = ("accelerate", "tqdm", "tomli")  # of requirements-train.txt
TRAINING = ("wuerstchen_core.training",)


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(file): file for folder in ("wuerstchen_core", "nodes") for file in sorted((ROOT / folder).rglob("*.py"))
} | {"": ROOT / "__init__.py"}


def imported(name: str) -> list[tuple[str, bool]]:
    """Absolute names that a module imports, anywhere in it, and whether that happens as soon as it is imported."""
    tree, found = ast.parse(FILES[name].read_text("utf-8")), []
    lazy = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for node in ast.walk(outer)
    }
    package = [PACK, *name.split(".")] if name else [PACK]
    if FILES[name].name != "__init__.py":
        package.pop()
    for node in ast.walk(tree):
        now = id(node) not in lazy
        if isinstance(node, ast.Import):
            found += [(alias.name, now) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found += [(f"{source}.{alias.name}", now) for alias in node.names]
    return found


def edges(name: str) -> set[str]:
    """The modules of this repository that a module imports."""
    found = set()
    for target, _ in imported(name):
        if target.split(".")[0] == PACK:
            own = target.removeprefix(f"{PACK}.")
            found.add(own if own in FILES else own.rpartition(".")[0])
    return found


def folder(name: str) -> str:
    """The row of MAY_IMPORT that a module belongs to."""
    if FILES[name].name == "__main__.py" or name in ("", "wuerstchen_core"):
        return "wuerstchen_core" if name else ""
    return name.split(".")[0] if name.startswith("nodes") else ".".join(name.split(".")[:2])


def rows() -> dict[str, list[str]]:
    """MAY_IMPORT with whole names."""
    return {row: [x if x == "nodes" else f"wuerstchen_core.{x}" for x in others] for row, others in MAY_IMPORT.items()}


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_what_its_folder_may(name: str) -> None:
    allowed = {
        folder(name),
        *(f"wuerstchen_core.{other}" for other in MAY_IMPORT[folder(name)]),
        *MAY_IMPORT[folder(name)],
    }
    for target in edges(name):
        assert target in FILES, f"{name} imports {target}, which does not exist"
        assert folder(target) in allowed, f"{name} imports {target}"


def test_no_folder_is_imported_by_one_that_it_imports() -> None:
    order = {
        row: {f"wuerstchen_core.{other}" if other != "nodes" else other for other in rows}
        for row, rows in MAY_IMPORT.items()
    }
    tuple(TopologicalSorter(order).static_order())


def test_there_is_no_circle() -> None:
    tuple(TopologicalSorter({name: edges(name) for name in FILES}).static_order())


@pytest.mark.parametrize("name", FILES)
def test_only_the_host_package_imports_comfyui(name: str) -> None:
    for target, _ in imported(name):
        top = target.split(".")[0]
        assert top not in HOST or name.startswith("nodes.host"), f"{name} imports {target}"
        assert top != "comfy_api" or name.startswith("nodes"), f"{name} imports {target}"


@pytest.mark.parametrize("name", FILES)
def test_slow_packages_are_imported_when_they_are_needed(name: str) -> None:
    for target, at_once in imported(name):
        top = target.split(".")[0]
        slow = top in SLOW or (top in TRAINERS and not name.startswith(TRAINING))
        assert not (slow and at_once), f"{name} imports {target} as soon as it is imported"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("wuerstchen_core")])
def test_the_core_imports_itself_by_relative_names(name: str) -> None:
    for target, _ in imported(name):
        assert target.split(".")[0] not in ("wuerstchen_core", "nodes"), f"{name} imports {target}"


def test_the_core_imports_without_comfyui() -> None:
    """In a fresh interpreter where ComfyUI cannot be found, and without a slow package or a word printed."""
    modules = [name for name in FILES if name.startswith("wuerstchen_core") and not name.endswith("__main__")]
    script = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {(*HOST, "comfy_api", *SLOW)!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
for name in {modules!r}:
    importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

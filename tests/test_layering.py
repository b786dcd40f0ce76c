"""Who may lean on whom: imports only run downwards, and the core knows nothing of ComfyUI."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACK = "pack"  # the repository's own name as a package: its folder's, which can be any

# Floors, by the longest name that fits; a module may import from lower floors, and from its own package.
FLOORS = {
    "wuerstchen_core.models.pointwise": -2,
    "wuerstchen_core.models.dropout": -2,
    "wuerstchen_core.models.mlp": -1,
    "wuerstchen_core.models.layers": 0,
    "wuerstchen_core.diffusion.schedule": 0,
    "wuerstchen_core.diffusion.sizes": 0,
    "wuerstchen_core.demo": 0,  # its vocabulary, drawings and judge
    "wuerstchen_core.demo.recipe": 8,  # how the model is made: trains and paints
    "wuerstchen_core.devices": 0,
    "wuerstchen_core.tables": 0,
    "wuerstchen_core.models": 1,
    "wuerstchen_core.diffusion": 1,
    "wuerstchen_core.sampling": 2,
    "wuerstchen_core.pictures": 2,
    "wuerstchen_core.checkpoints": 2,
    "wuerstchen_core.compiling": 2,
    "nodes.host": 3,
    "wuerstchen_core.stages": 3,
    "wuerstchen_core.prompts": 4,
    "wuerstchen_core.editing": 5,
    "wuerstchen_core.pipeline": 6,
    "wuerstchen_core.training": 7,
    "wuerstchen_core.training.data": 3,
    "wuerstchen_core.training.inputs": 3,
    "wuerstchen_core.training.optimizers": 0,
    "wuerstchen_core.bench": 7,
    "nodes": 4,
    "wuerstchen_core": 7,  # the package itself, which gives the pipeline
    "wuerstchen_core.commands": 8,
    "wuerstchen_core.cli": 9,
    "wuerstchen_core.__main__": 10,
    "": 10,  # what ComfyUI imports
}
# What the nodes stand on: in ComfyUI the graph is the pipeline.
NODES_MAY = (
    "nodes",
    "wuerstchen_core.models",
    "wuerstchen_core.diffusion",
    "wuerstchen_core.checkpoints",
    "wuerstchen_core.demo",
    "wuerstchen_core.pictures",
    "wuerstchen_core.sampling",
)
HOST = ("comfy", "folder_paths", "execution", "server", "latent_preview", "node_helpers")
SLOW = ("torchvision", "open_clip", "transformers", "diffusers", "resvg_py", "webdataset", "braceexpand")
TRAINERS = ("accelerate", "tqdm", "tomli")  # of requirements-train.txt
TRAINING = ("wuerstchen_core.training", "wuerstchen_core.demo.recipe")


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


def floor(name: str) -> int:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:length])) in FLOORS and not (prefix == "wuerstchen_core" and length < len(parts)):
            return FLOORS[prefix]
    pytest.fail(f"{name} has no floor: give it one in FLOORS")


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name: str) -> None:
    package = name.rpartition(".")[0]
    for target in edges(name):
        assert target in FILES, f"{name} imports {target}, which is not there"
        same_package = target.rpartition(".")[0] in {package, name} - {"", "wuerstchen_core"}
        below = floor(target) < floor(name) or (same_package and floor(target) == floor(name))
        lazily_exported = name == "wuerstchen_core" and target == "wuerstchen_core.pipeline"
        assert below or lazily_exported, f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})"
        if name.startswith("nodes"):
            assert target.startswith(NODES_MAY), f"{name} imports {target}"


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

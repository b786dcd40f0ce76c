"""Imports: which folder may import which, and that the library works without ComfyUI."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACK = "pack"  # the package that the repository is inside ComfyUI, where its folder can have any name

# Each folder, and the other folders that its modules may import. There are no exceptions.
LIBRARY = {
    "common": [],
    "demo": ["common"],
    "kernels": ["common"],
    "models": ["common", "kernels"],
    "diffusion": ["common", "models"],
    "checkpoints": ["common", "models", "diffusion"],
    "inference": ["common", "models", "diffusion", "checkpoints", "demo"],
    "training": ["common", "kernels", "models", "diffusion", "checkpoints", "inference", "demo"],
    "cli": ["common", "diffusion", "checkpoints", "inference", "training", "demo"],
    "wuerstchen_core": ["inference", "cli"],  # the modules directly in this folder
}
MAY_IMPORT = {
    **LIBRARY,
    "nodes": ["common", "kernels", "models", "diffusion", "checkpoints", "inference", "demo"],
    "__init__": ["nodes"],  # the entry point for ComfyUI
    "tools": [*LIBRARY, "nodes"],
}

COMFYUI = ("comfy", "folder_paths", "execution", "server", "latent_preview", "node_helpers")
SLOW = ("torchvision", "open_clip", "transformers", "diffusers", "resvg_py", "webdataset", "braceexpand")
TRAINERS = ("accelerate", "tqdm", "tomli")  # of requirements-train.txt


def module_name(file: Path) -> str:
    """Returns a name such as "wuerstchen_core.cli.main", or "__init__" for the entry point."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


PATTERNS = ("__init__.py", "wuerstchen_core/**/*.py", "nodes/**/*.py", "tools/**/*.py")
FILES = {module_name(file): file for pattern in PATTERNS for file in sorted(ROOT.glob(pattern))}


def top(name: str) -> str:
    """Returns the outermost package of a module."""
    return name.split(".")[0]


def folder(module: str) -> str:
    """Returns the folder of MAY_IMPORT that a module is in."""
    first, *rest = module.split(".")
    return rest[0] if first == "wuerstchen_core" and rest and rest[0] != "__main__" else first


def imports(module: str) -> list[tuple[str, bool]]:
    """Returns the absolute names that a module imports, and whether that happens as soon as it is imported itself."""
    tree, found = ast.parse(FILES[module].read_text("utf-8")), []
    later = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for node in ast.walk(outer)
    }
    package = [PACK, *FILES[module].relative_to(ROOT).parts[:-1]]
    for node in ast.walk(tree):
        now = id(node) not in later
        if isinstance(node, ast.Import):
            found += [(alias.name, now) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found += [(f"{source}.{alias.name}", now) for alias in node.names]
    return found


def own_imports(module: str) -> set[str]:
    """Returns the modules of this repository that a module imports."""
    names = set()
    for target, _ in imports(module):
        name = target.removeprefix(f"{PACK}.")
        if name != target or top(name) in ("wuerstchen_core", "tools"):
            names.add(name if name in FILES else name.rpartition(".")[0])
    return names


PACK_MODULES = [module for module in FILES if top(module) != "tools"]  # library, nodes and entry point


def test_modules_import_only_what_their_folder_may() -> None:
    for module in FILES:
        for target in own_imports(module):
            assert target in FILES, f"{module} imports {target}, which does not exist"
            allowed = (folder(module), *MAY_IMPORT[folder(module)])
            assert folder(target) in allowed, f"{module} imports {target}"


def test_no_imports_form_a_circle() -> None:
    for graph in (MAY_IMPORT, {module: own_imports(module) for module in PACK_MODULES}):
        tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_only_nodes_import_comfyui() -> None:
    for module in PACK_MODULES:
        for target, _ in imports(module):
            assert top(target) not in COMFYUI or module.startswith("nodes.host"), f"{module} imports {target}"
            assert top(target) != "comfy_api" or module.startswith("nodes"), f"{module} imports {target}"


def test_slow_packages_are_imported_inside_functions() -> None:
    for module in PACK_MODULES:
        slow = SLOW if module.startswith("wuerstchen_core.training") else (*SLOW, *TRAINERS)
        for target, now in imports(module):
            assert not (now and top(target) in slow), f"{module} imports {target} as soon as it is imported"


def test_library_and_nodes_import_this_repository_by_relative_names() -> None:
    for module in PACK_MODULES:
        for target, _ in imports(module):
            assert top(target) not in ("wuerstchen_core", "tools"), f"{module} imports {target}"


def test_the_library_imports_without_comfyui() -> None:
    """In a new interpreter without ComfyUI and the slow packages; nothing is printed."""
    names = [module for module in FILES if top(module) == "wuerstchen_core" and not module.endswith("__main__")]
    script = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {(*COMFYUI, "comfy_api", *SLOW)!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
for name in {names!r}:
    importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

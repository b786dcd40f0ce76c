"""Run by ComfyUI's Python, `inside_canvas.py COMFYUI OUTPUT`: loads this pack twice, as ComfyUI does, then its shipped
model, and returns what that changed in ComfyUI, and which names it lacks. For test_host_canvas.py."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from host_names import VAE, used_names
from torch import Tensor

from tools.comfyui.in_host import write_results

REPOSITORY = str(Path(__file__).resolve().parents[2])
PACKAGES = (
    "comfy",
    "comfy_api",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "server",
)
OTHERS = ("torch", "torch.nn.functional", "safetensors.torch", "numpy.random", "logging", "builtins")


def attributes(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """Yields the functions and classes of a module, the attributes of these classes, and the contents of its tables."""
    for key, value in list(vars(thing).items()):
        path = f"{name}.{key}"
        if isinstance(value, FunctionType | type | classmethod | staticmethod | property):
            yield path, id(value)
        if isinstance(value, type) and value.__module__ == name:
            yield from attributes(path, value)
        elif isinstance(value, list | tuple | set | frozenset) and (key.isupper() or isinstance(thing, type)):
            yield path, sorted(map(repr, value))
        elif isinstance(value, dict) and (key.isupper() or key == "folder_names_and_paths"):
            yield path, sorted(map(repr, value.items()))


def snapshot(modules: dict[str, ModuleType]) -> dict[str, Any]:
    """Returns everything that a pack could replace."""
    seen = {path: value for name, module in modules.items() for path, value in attributes(name, module)}
    root = logging.getLogger()
    seen["root logger"] = [root.level, *map(id, root.handlers), *map(id, root.filters)]
    return seen


def changes(before: dict[str, Any], modules: dict[str, ModuleType]) -> list[str]:
    now = snapshot(modules)
    return sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))


def exists(name: str) -> bool:
    """True if a dotted path leads to a module, or to an attribute of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


def missing_names() -> list[str]:
    """Returns the names that the pack uses and this ComfyUI lacks."""
    from comfy.sd import VAE as ComfyVAE

    source = inspect.getsource(ComfyVAE)
    unread = [f"comfy.sd.VAE().{name}" for name in VAE if not re.search(rf"\bself\.{name}\b(?! = )", source)]
    return unread + [name for name in used_names() if not exists(name)]


def main() -> tuple[dict[str, Tensor], dict[str, Any]]:
    import nodes  # ComfyUI's

    importlib.import_module("comfy_config.config_parser")  # ComfyUI imports it with the first pack

    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] in PACKAGES or name in OTHERS}
    facts: dict[str, Any] = {"watched": len(modules)}
    before, mapped, loaded = snapshot(modules), dict(nodes.NODE_CLASS_MAPPINGS), set(sys.modules)
    facts["imported"] = asyncio.run(nodes.load_custom_node(REPOSITORY, module_parent="custom_nodes"))
    new = {name.split(".")[0] for name in sys.modules.keys() - loaded if not name.startswith(REPOSITORY)}
    facts["other packages imported"] = sorted(new - set(sys.stdlib_module_names))
    first = nodes.NODE_CLASS_MAPPINGS.keys() - mapped.keys()
    facts["imported again"] = asyncio.run(nodes.load_custom_node(REPOSITORY, module_parent="custom_nodes"))
    facts["nodes"] = sorted(first)
    facts["nodes after a reload"] = sorted(nodes.NODE_CLASS_MAPPINGS.keys() - mapped.keys())
    facts["replaced nodes"] = sorted(name for name in mapped if nodes.NODE_CLASS_MAPPINGS[name] is not mapped[name])
    loader = nodes.NODE_CLASS_MAPPINGS["WuerstchenBundleLoader"]
    loader.execute(loader.GET_SCHEMA().inputs[0].default)
    facts["changed"] = changes(before, modules)
    facts["missing"] = missing_names()
    return {}, facts


if __name__ == "__main__":
    write_results(main)

"""For scripts run by ComfyUI's Python: imports ComfyUI and this pack, and writes the results."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def load_pack() -> ModuleType:
    """Imports this repository as the package `pack`, in the way ComfyUI does."""
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("pack", root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = pack
    spec.loader.exec_module(pack)
    return pack


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def enter() -> list[str]:
    """Makes ComfyUI (the first argument) importable, on the CPU; returns the other arguments."""
    _, comfyui, *arguments = sys.argv
    sys.argv = sys.argv[:1]
    sys.path.insert(0, comfyui)  # first, because ComfyUI has a module `nodes`
    from comfy.cli_args import args

    args.cpu = True
    return arguments


def write_results(main: Callable[..., tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
    """Runs `main` with the arguments after ComfyUI, except the last: the file for its tensors and facts."""
    *arguments, output = enter()
    with torch.inference_mode():
        tensors, facts = main(*arguments)
    copies = {key: x.clone(memory_format=torch.contiguous_format) for key, x in tensors.items()}
    save_file(copies, output, metadata={"facts": json.dumps(facts)})

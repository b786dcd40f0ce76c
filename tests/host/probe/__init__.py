"""A node pack beside ours in the tests' ComfyUIs: a node of any value, and routes that tell what ComfyUI does."""

from __future__ import annotations

import ctypes
import gc
import json as json_module
import os
import sys
from pathlib import Path
from typing import Any

import comfy.model_management as management
import torch
from aiohttp import web
from server import PromptServer

PATHS = ("open", "os.", "shutil.", "glob.", "pathlib.")  # beginnings of audit events that name files
PROCESSES = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.")
routes = PromptServer.instance.routes
_events: set[tuple[str, str]] = set()
_late_calls: list[str] = []


class AnyType(str):
    """A type that fits every other."""

    def __ne__(self, other: object) -> bool:
        return False


class ProbeValue:
    """Outputs a value of JSON. ComfyUI checks no links, so that the value gets to nodes unchecked."""

    RETURN_TYPES, FUNCTION, CATEGORY = (AnyType("*"),), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"json": ("STRING", {})}}

    def run(self, json: str) -> tuple[Any]:
        return (json_module.loads(json),)


class ProbeSink:
    """Runs the node that is connected to it."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "probe", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (AnyType("*"), {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: Any) -> bool:
        return True

    def run(self, value: Any) -> tuple[()]:
        return ()


NODE_CLASS_MAPPINGS = {"ProbeValue": ProbeValue, "ProbeSink": ProbeSink}


class MallInfo(ctypes.Structure):
    """glibc's count of the bytes that it manages."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@routes.get("/probe/memory")
async def memory(_: web.Request) -> web.Response:
    """Returns, after a garbage collection, the bytes that libraries and tensors use, the number of Python's small
    blocks, and the resident bytes once free memory was returned to the system."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallinfo2.restype = MallInfo
    info = libc.mallinfo2()
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    resident = next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    return web.json_response(
        {"used": info.uordblks + info.hblkhd, "blocks": sys.getallocatedblocks(), "resident": resident}
    )


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event.startswith(PROCESSES):
        _events.add((event, repr(args)[:200]))
    elif event.startswith(PATHS):
        paths = [x for x in args[:2] if isinstance(x, str | bytes | os.PathLike)]
        _events.update((event, os.path.abspath(os.fsdecode(path))) for path in paths)


@routes.get("/probe/events")
async def events(_: web.Request) -> web.Response:
    """Returns the files that Python touched and the processes that it started since the last request."""
    if not hasattr(events, "hook"):
        events.hook = _audit
        sys.addaudithook(_audit)
        _events.clear()
    found = sorted(_events)
    _events.clear()
    return web.json_response(found)


def _note_late_call(module: torch.nn.Module, _: Any) -> None:
    if hasattr(module, "params") and management.processing_interrupted():
        _late_calls.append(type(module).__name__)


@routes.get("/probe/late")
async def late(_: web.Request) -> web.Response:
    """Returns the networks that were called since the last request although ComfyUI was interrupted."""
    if not hasattr(late, "hook"):
        late.hook = torch.nn.modules.module.register_module_forward_pre_hook(_note_late_call)
    found = list(_late_calls)
    _late_calls.clear()
    return web.json_response(found)

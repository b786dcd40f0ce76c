"""Hundreds of random prompts in one ComfyUI: each succeeds or is refused in one line, and memory does not grow."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import Graph
from errors import check_error
from random_prompts import SIZES, Prompts, serving

from tools.comfyui.client import Install, Server

PROMPTS = 500  # of which the first ones, each workflow in each size, fill the caches
SAMPLES = 4
GROWTH = 0.01
WAIT = 60.0  # seconds for ComfyUI to free its models on a busy machine


def memory(server: Server) -> dict[str, int]:
    """Returns the probe's measurements after ComfyUI has freed its models, results and history."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    server.post("/history", {"clear": True})
    deadline, found = time.monotonic() + WAIT, server.get("/probe/memory")
    while time.monotonic() < deadline:
        time.sleep(1)
        before, found = found, server.get("/probe/memory")
        if abs(found["used"] - before["used"]) < 1e-3 * found["used"]:
            break
    return found


def run(server: Server, graph: Graph) -> str:
    outcome = server.run(graph)
    if outcome.status == "execution_error":
        check_error(outcome.error)
    return outcome.status


@pytest.mark.long
def test_memory_does_not_grow(install: Install, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """What is in use is counted by the allocators, so that fragmentation does not matter.

    Torch and oneDNN keep a prepared computation for each shape, up to a limit: the first prompts have all shapes.
    """
    rng = random.Random(22)
    with serving(install, tmp_path) as server:
        prompts = Prompts(server.get("/object_info"))
        first = [prompts.small(name, rng, size) for name in prompts.graphs for size in SIZES]
        statuses = Counter(run(server, graph) for graph in first)
        assert set(statuses) == {"execution_success"}
        found, left = [memory(server)], PROMPTS - len(first)
        for _ in range(SAMPLES):
            statuses.update(run(server, prompts.any(rng)) for _ in range(left // SAMPLES))
            found.append(memory(server))
        record_property("memory", found)
        assert statuses["execution_success"] > PROMPTS / 2 and statuses["execution_error"] > PROMPTS / 50
        for name in ("used", "blocks"):
            assert found[-1][name] < (1 + GROWTH) * found[0][name], found

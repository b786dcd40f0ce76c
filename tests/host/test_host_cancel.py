"""Prompts cancelled at random points: the work stops within a step, and the next prompt gives the right pictures."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import Graph
from random_prompts import Prompts, serving

from tools.comfyui.client import Install, Outcome, Server

WORKFLOWS = (
    "text_to_image",
    "text_to_image_ksampler",
    "text_to_image_v1",
    "image_to_image",
    "inpaint",
    "interpolate_prompts",
    "interpolate_pictures",
    "lora",
)
POINTS = 100
LONGEST = 5.0  # seconds until a cancelled prompt ends, on a busy machine


def cancelled(server: Server, graph: Graph, seconds: float) -> tuple[Outcome, float]:
    """Cancels a prompt some seconds after its start; returns its outcome, and how many seconds later it ended."""
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(lambda: (server.run(graph), time.monotonic()))
        time.sleep(seconds)
        server.post("/interrupt")
        at = time.monotonic()
        outcome, end = run.result()
    return outcome, end - at


def timed(server: Server, graph: Graph) -> tuple[list[np.ndarray], float]:
    """Returns the pictures of a prompt, and its seconds."""
    start = time.monotonic()
    outcome = server.run(graph)
    assert outcome.status == "execution_success", outcome.error
    return [np.asarray(picture) for picture in outcome.pictures], time.monotonic() - start


@pytest.mark.long
def test_cancelled_anywhere_the_next_prompt_is_right(
    install: Install, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    rng = random.Random(22)
    with serving(install, tmp_path, "--cache-classic") as server:  # each prompt computes all of its nodes again
        prompts = Prompts(server.get("/object_info"))
        graphs, expected, seconds = {}, {}, {}
        for name in WORKFLOWS:
            graphs[name] = copy.deepcopy(prompts.graphs[name])
            for node in graphs[name].values():
                if node["class_type"] == "WuerstchenEmptyLatents":
                    node["inputs"].update(width=128, height=128)
            expected[name], seconds[name] = timed(server, graphs[name])
        server.get("/probe/late")
        delays: list[tuple[float, str]] = []
        name = WORKFLOWS[-1]
        while len(delays) < POINTS:
            name = rng.choice([other for other in WORKFLOWS if other != name])  # ComfyUI has the last one's results
            if rng.random() < 0.5:  # the models are loaded again
                server.post("/free", {"unload_models": True, "free_memory": True})
            outcome, delay = cancelled(server, graphs[name], rng.uniform(0, seconds[name]))
            if outcome.status == "execution_success":  # it ended before
                continue
            assert outcome.status == "execution_interrupted", outcome.error
            assert len(server.get("/probe/late")) <= 1, name  # called between the check and the call
            delays.append((delay, name))
            found, seconds[name] = timed(server, graphs[name])
            assert len(found) == len(expected[name])
            assert all(map(np.array_equal, found, expected[name])), name
        record_property("delays", sorted(delays))
        assert max(delays)[0] < LONGEST

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
LONGEST = 5.0  # seconds until a cancelled prompt ends, on a busy machine; a step of these takes up to 1


def cancelled(server: Server, graph: Graph, seconds: float) -> tuple[Outcome, float]:
    """Cancels a prompt some seconds after its start; returns its outcome, and how many seconds later it ended."""
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(lambda: (server.run(graph), time.monotonic()))
        time.sleep(seconds)
        server.post("/interrupt")
        at = time.monotonic()
        outcome, end = run.result()
    return outcome, end - at


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
                    node["inputs"].update(width=192, height=192, batch_size=2)
            start = time.monotonic()
            expected[name] = server.run(graphs[name]).pictures
            seconds[name] = time.monotonic() - start
        server.get("/probe/late")
        stopped, slowest = 0, (0.0, "")
        for _ in range(POINTS):
            name = rng.choice(WORKFLOWS)
            if rng.random() < 0.5:  # the models are loaded again
                server.post("/free", {"unload_models": True, "free_memory": True})
            outcome, delay = cancelled(server, graphs[name], rng.uniform(0.05, seconds[name]))
            assert outcome.status in ("execution_interrupted", "execution_success"), outcome.error
            if outcome.status == "execution_interrupted":
                stopped += 1
                slowest = max(slowest, (delay, name))
                assert len(server.get("/probe/late")) <= 1
            after = server.run(graphs[name])
            assert after.status == "execution_success" and len(after.pictures) == len(expected[name]), after.error
            for picture, right in zip(after.pictures, expected[name], strict=True):
                assert np.array_equal(np.asarray(picture), np.asarray(right)), name
        record_property("cancelled", f"{stopped} of {POINTS}, at most {slowest[0]:.2f} s late ({slowest[1]})")
        assert stopped > POINTS / 2 and slowest[0] < LONGEST

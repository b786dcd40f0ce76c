"""Random prompts of the shipped workflows, made small, and prompts that are wrong."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bundles import FOREIGN, HALF, Graph, find

from tools.comfyui.client import Install, Server
from tools.comfyui.graphs import NEWER, RELEASED, RELEASED_V1, api_form, names, workflow
from wuerstchen_core.demo.vocabulary import COLOURS, THINGS

SIZES = ((128, 128, 1), (256, 192, 1), (192, 128, 2))  # width, height, batch size


@contextmanager
def serving(install: Install, folder: Path, *options: str) -> Iterator[Server]:
    """A ComfyUI of its own, with the probe."""
    server = Server(install, folder / "base", options=options)
    add_probe(server)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def add_probe(server: Server) -> None:
    """Puts the node pack of tests/host/probe beside ours."""
    probe = Path(__file__).with_name("probe")
    (server.folder / "custom_nodes" / "probe").symlink_to(probe, target_is_directory=True)


class Prompts:
    """The shipped workflows that need no other files, as prompts."""

    def __init__(self, object_info: Mapping[str, Any]):
        left_out = (*NEWER, RELEASED, RELEASED_V1)
        self.graphs = {name: api_form(workflow(name), object_info) for name in names() if name not in left_out}

    def small(self, name: str, rng: random.Random, size: tuple[int, int, int] | None = None) -> Graph:
        """Returns a workflow of a size with random text and seed, and one or two steps."""
        graph = copy.deepcopy(self.graphs[name])
        width, height, batch_size = size or rng.choice(SIZES)
        for node in graph.values():
            inputs = node["inputs"]
            if "seed" in inputs and not isinstance(inputs["seed"], list):
                inputs["seed"] = rng.randrange(1000)
            if "steps" in inputs:
                inputs["steps"] = rng.choice((1, 2))
            if "schedule" in inputs:
                inputs["schedule"] = "linear"
            if node["class_type"] == "WuerstchenEmptyLatents":
                inputs.update(width=width, height=height, batch_size=batch_size)
            if node["class_type"] == "WuerstchenLoraLoader":
                inputs["strength_model"] = rng.choice((0.0, 0.5, 1.0))
            if inputs.get("text"):
                inputs["text"] = f"a {rng.choice(THINGS).name} on a {rng.choice(list(COLOURS))} background"
        return graph

    def wrong(self, rng: random.Random) -> Graph:
        """Returns a prompt that ComfyUI or a node refuses."""
        graph = self.small("text_to_image", rng)
        loader = next(key for key, node in graph.items() if node["class_type"] == "WuerstchenBundleLoader")
        number = {"class_type": "ProbeValue", "inputs": {"json": rng.choice(("NaN", "-1", "1e400", '"x"', "null"))}}
        match rng.randrange(5):
            case 0:
                find(graph, "WuerstchenBundleLoader")["bundle"] = rng.choice((FOREIGN, HALF, "gone.safetensors"))
            case 1:
                find(graph, "WuerstchenPriorSample")["model"] = [loader, 1]
            case 2:
                find(graph, "WuerstchenDecoderSample")["cfg"] = 2.0
            case 3:
                graph["number"] = number
                find(graph, "WuerstchenPriorSample")[rng.choice(("steps", "cfg", "denoise"))] = ["number", 0]
            case 4:
                find(graph, "WuerstchenTextEncode")["text"] = ["number", 0]
                graph["number"] = number
        return graph

    def any(self, rng: random.Random) -> Graph:
        """Returns one of `small`, or one of `wrong` in eight."""
        return self.wrong(rng) if rng.random() < 0.125 else self.small(rng.choice(list(self.graphs)), rng)

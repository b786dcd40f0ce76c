"""Runs each of ComfyUI's own nodes between CONDITIONING and CONDITIONING on ours, for inside_conditioning.py and
inside_tokens.py."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tools.comfyui.in_host import seeded

Sample = Callable[[Any, Any], Tensor]  # positive and negative to denoised latents

DIFFERENT, NOTICE, REFUSED = "different", "notice", "refused"
OWN_ERROR = "own error"  # the node itself failed, since its other inputs are not of its model
SILENT, RAW = "silent", "raw error"


@contextmanager
def logged() -> Any:
    """Collects the messages of this pack's loggers."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pack")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def node_classes() -> dict[str, Any]:
    """Returns ComfyUI's own nodes that take and give a CONDITIONING."""
    import nodes

    sys.path.insert(0, str(Path(nodes.__file__).parent))  # ComfyUI's `utils`, which `comfy/utils.py` hides in 0.3.64
    asyncio.run(nodes.init_builtin_extra_nodes())
    found = {}
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        kinds = [kind[0] for section in node.INPUT_TYPES().values() for kind in section.values()]
        if "CONDITIONING" in kinds and "CONDITIONING" in node.RETURN_TYPES:
            found[name] = node
    return found


def control_net() -> Any:
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        concat_mask = False

        def copy(self) -> Control:
            self.copy_to(copied := Control())
            return copied

    return Control()


class StyleModel:
    def get_cond(self, _: Any) -> Tensor:
        return seeded(1, 4, 8)


def value(kind: Any, options: dict[str, Any], ours: dict[str, Any]) -> Any:
    """Returns an input that makes a node do something."""
    if isinstance(kind, list) or kind == "COMBO":
        return (kind if isinstance(kind, list) else options["options"])[-1]
    if kind == "FLOAT":
        return min(max(0.37, options.get("min", 0.0)), options.get("max", 1.0))
    if kind == "INT":
        return min(max(64, options.get("min", 0)), options.get("max", 64))
    made = {
        "BOOLEAN": lambda: True,
        "STRING": lambda: "a cat",
        "IMAGE": lambda: seeded(1, 64, 64, 3).sigmoid(),
        "MASK": lambda: torch.eye(64)[None],
        "LATENT": lambda: {"samples": seeded(1, 4, 16, 16)},
        "CONTROL_NET": control_net,
        "GLIGEN": object,
        "STYLE_MODEL": StyleModel,
        "CLIP_VISION_OUTPUT": lambda: SimpleNamespace(
            penultimate_hidden_states=seeded(1, 4, 8), image_embeds=seeded(1, 8), last_hidden_state=seeded(1, 4, 8)
        ),
        "TIMESTEPS_RANGE": lambda: (0.0, 0.9),
    }
    return ours[kind] if kind in ours else made[kind]()


def run_node(node: Any, ours: dict[str, Any]) -> Any:
    """Returns a node's CONDITIONING outputs; its CONDITIONING inputs get `ours` in turn, the last one repeatedly."""
    arguments, conditionings = {}, iter(ours["CONDITIONING"])
    conditioning = None
    for section in ("required", "optional"):
        for name, (kind, *rest) in node.INPUT_TYPES().get(section, {}).items():
            if kind in ("HOOKS", "VAE") and section == "optional":
                continue
            if kind == "CONDITIONING":
                conditioning = arguments[name] = next(conditionings, conditioning)
            else:
                arguments[name] = value(kind, rest[0] if rest else {}, ours)
    if hasattr(node, "define_schema"):
        results = node.execute(**arguments).result
    else:
        results = getattr(node(), node.FUNCTION)(**arguments)
    return [x for x, kind in zip(results, node.RETURN_TYPES, strict=False) if kind == "CONDITIONING"]


def walk(sample: Sample, first: Any, second: Any, clip: Any, vae: Any) -> dict[str, list[str]]:
    """Returns, by node, the result of sampling with its outputs: one of the words above, and the sentence."""
    before, outcomes = sample(first, second), {}
    for name, node in node_classes().items():
        try:
            positive, *negative = run_node(node, {"CONDITIONING": (first, second), "CLIP": clip, "VAE": vae})
        except Exception as error:
            outcomes[name] = [OWN_ERROR, f"{type(error).__name__}: {error}"]
            continue
        with logged() as messages:
            try:
                after = sample(positive, negative[0] if negative else second)
            except ValueError as error:
                outcomes[name] = [REFUSED, str(error)]
            except Exception as error:
                outcomes[name] = [RAW, f"{type(error).__name__}: {error}"]
            else:
                kind = NOTICE if messages else SILENT if torch.equal(before, after) else DIFFERENT
                outcomes[name] = [kind, " ".join(dict.fromkeys(messages))]
    return outcomes

"""Reads the settings of a picture from the ComfyUI graph in its metadata; the inverse of `workflow`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..checkpoints.components import TOWERS
from ..common.geometry import nearest_legal
from ..diffusion.schedule import SCHEDULES, named_times
from .comfyui_nodes import SHIPPED_NAMES
from .embeddings import has_embedding
from .workflow import APPLY, BUNDLE_OUTPUTS, HINT_WIDGETS, LOADERS, V1_LABELS

WEIGHTS = re.compile(r"(?<!\\)[()]")
ESCAPES = re.compile(r"\\([()])")
PRIMITIVES = ("PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "PrimitiveStringMultiline")
OUTPUTS = ("SaveImage", "PreviewImage")
DECODES = ("WuerstchenVAEDecode", "VAEDecode")
STAGES_B = ("WuerstchenDecoderSample", "WuerstchenTokenDecoderSample")


def record_of_graph(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a graph in the form of ComfyUI's API, with `count` for its batch.

    Raises ValueError with a reason if the graph does more than text to image with this pack's sampling nodes.
    """
    try:
        return _Reader(prompt).read()
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"its ComfyUI graph is incomplete ({error})") from error


class _Reader:
    def __init__(self, prompt: Mapping[str, Any]):
        self.prompt = prompt

    def read(self) -> dict[str, Any]:
        outputs = [node for node in self.prompt.values() if node["class_type"] in OUTPUTS]
        if len(outputs) != 1:
            raise ValueError(f"its ComfyUI graph has {len(outputs)} image outputs, and one is needed")
        decode = self.follow(outputs[0]["inputs"]["images"], *DECODES)
        decoder = self.follow(decode.get("stage_b", decode.get("samples")), *STAGES_B)
        cond = self.follow(decoder["positive"], "WuerstchenDecoderConditioning")
        prior = self.follow(cond["stage_c"], "WuerstchenPriorSample")
        latents = self.follow(prior["stage_c"], "WuerstchenEmptyLatents")
        self.follow(decoder["stage_b"], "WuerstchenEmptyLatents")
        control, links = self.hints([prior["positive"], prior["negative"]])
        text, negative = (self.follow(link, "WuerstchenTextEncode") for link in links)
        texts = {x: self.text(node) for x, node in (("prompt", text), ("negative", negative))}
        other = self.text(self.follow(cond["conditioning"], "WuerstchenTextEncode"))
        others = [self.text(self.follow(decoder["negative"], "WuerstchenTextEncode"))] if "negative" in decoder else []
        v1 = "temperature" in decoder
        scale = self.value(decoder["cfg"])
        if other != texts["prompt"] or (others and scale > 1 and others[0] != texts["negative"]):
            raise ValueError("its stages have different prompts")
        seeds = [self.value(node["seed"]) for node in (prior, decoder)]
        if seeds[0] != seeds[1]:
            raise ValueError(f"its stages have different seeds ({seeds[0]} and {seeds[1]})")
        if {self.value(node.get("denoise", 1.0)) for node in (prior, decoder)} != {1.0}:
            raise ValueError("it was not made from text alone (its denoise is below 1)")
        schedule = self.value(prior["schedule"])
        record = {
            **texts,
            "seed": seeds[0],
            "count": self.value(latents["batch_size"]),
            **self.files(prior, decoder, text, decode, v1),
            "width": nearest_legal(self.value(latents["width"])),
            "height": nearest_legal(self.value(latents["height"])),
            "schedule": schedule,
            "prior_steps": len(named_times(schedule, self.value(prior["steps"]))) - 1,
            "prior_guidance": self.value(prior["cfg"]),
            "decoder_steps": self.value(decoder["steps"]),
            "decoder_guidance": scale,
            "sampler": SCHEDULES[schedule].sampler,
            **({"control": control} if control else {}),
        }
        if (reuse := self.value(decoder.get("reuse", 1))) > 1:
            record["decoder_reuse"] = reuse
        if v1:
            record["temperature"] = [self.value(decoder[x]) for x in ("temperature", "temperature_end")]
            record["token_mode"] = self.value(decoder["mode"])
            record |= {"decoder_guidance_end": end} if (end := self.value(decoder["cfg_end"])) else {}
        return record

    def follow(self, link: Any, *expected: str) -> Any:
        """Returns the inputs of the linked node. Raises ValueError if it is of another class."""
        node = self.prompt[link[0]]
        if node["class_type"] not in expected:
            raise ValueError(f"its ComfyUI graph uses the node {node['class_type']} instead of {' or '.join(expected)}")
        return node["inputs"]

    def value(self, value: Any) -> Any:
        return self.follow(value, *PRIMITIVES)["value"] if isinstance(value, list) else value

    def text(self, node: Mapping[str, Any]) -> str:
        text = self.value(node["text"])
        if has_embedding(text):  # read as ComfyUI does
            return text
        if WEIGHTS.search(text):
            raise ValueError("its prompt has weights in parentheses, which only ComfyUI applies")
        return ESCAPES.sub(r"\1", text)

    def hints(self, links: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
        """Returns the records of the hints in two linked conditionings, and the links of these without hints."""
        found: list[dict[str, Any]] = []
        while self.prompt[links[0][0]]["class_type"] == APPLY:
            if links != [[links[0][0], 0], [links[0][0], 1]]:
                raise ValueError("its ControlNets steer only one side of guidance")
            inputs = self.follow(links[0], APPLY)
            net = self.follow(inputs["control_net"], "WuerstchenControlNetLoader")
            image = self.follow(inputs["image"], "LoadImage")
            values = {name: self.value(inputs[widget]) for name, widget in HINT_WIDGETS.items()}
            name = self.value(net["control_net_name"])
            found.insert(0, {"file": SHIPPED_NAMES.get(name, name), "image": image["image"], **values})
            links = [inputs["positive"], inputs["negative"]]
        return found, links

    def files(self, prior: Any, decoder: Any, text: Any, decode: Any, v1: bool) -> dict[str, Any]:
        """Returns the record's entries for the model, its replaced parts and LoRAs."""
        stage_b = "token_decoder" if v1 else "decoder"
        links = {"prior": prior["model"], stage_b: decoder["token_decoder" if v1 else "model"], "vqgan": decode["vae"]}
        links |= {tower: text[f"{tower.split('_')[0]}_clip"] for tower in TOWERS}
        loras: dict[str, dict[str, Any]] = {}
        names = {part: self.file(part, link, loras) for part, link in links.items()}
        shared = {name for name, is_part in names.values() if not is_part}
        if len(shared) > 1:
            raise ValueError(f"its parts come from several bundles ({', '.join(sorted(shared))})")
        found: dict[str, Any] = {"model": shared.pop()} if shared else {}
        parts = {part: {"file": name} for part, (name, is_part) in names.items() if is_part}
        if parts.keys() >= set(TOWERS) and parts[TOWERS[0]] == parts[TOWERS[1]]:
            parts["text_encoder"] = parts.pop(TOWERS[0])
            del parts[TOWERS[1]]
        return found | ({"parts": parts} if parts else {}) | ({"loras": list(loras.values())[::-1]} if loras else {})

    def file(self, part: str, link: Any, loras: dict[str, dict[str, Any]]) -> tuple[str, bool]:
        """Returns the file of a part, and True if it holds only that. Adds the LoRAs to `loras`, the last first."""
        node, widget, _ = LOADERS[part]
        while self.prompt[link[0]]["class_type"] == "WuerstchenLoraLoader":
            inputs = self.follow(link, "WuerstchenLoraLoader")
            strengths = [self.value(inputs[f"strength_{x}"]) for x in ("model", "clip")]
            if strengths[0] != strengths[1]:
                raise ValueError("a LoRA has different strengths for model and text encoder")
            name = self.value(inputs["lora_name"])
            loras.setdefault(link[0], {"file": SHIPPED_NAMES.get(name, name), "strength": strengths[0]})
            link = inputs["model" if link[1] == 0 else "clip"]
        inputs = self.follow(link, node, "WuerstchenBundleLoader")
        if "bundle" in inputs:
            if BUNDLE_OUTPUTS[link[1]] != part:
                raise ValueError(f"its ComfyUI graph uses the bundle's {BUNDLE_OUTPUTS[link[1]]} as {part}")
            return SHIPPED_NAMES.get(self.value(inputs["bundle"]), self.value(inputs["bundle"])), False
        name = self.value(inputs[widget])
        label, _, bundle = name.partition(" of ")
        if bundle and label.partition(" (")[0] in V1_LABELS.values():
            return SHIPPED_NAMES.get(bundle, bundle), False
        return name, True

"""Builds the ComfyUI graph that generates a picture, from the picture's settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..checkpoints.components import TOWERS
from ..diffusion.schedule import SCHEDULES
from .comfyui_nodes import SHIPPED, Prompt
from .embeddings import has_embedding
from .settings import SamplingSettings

V1_LABELS = {  # the loaders' names of parts of a v1 bundle
    "prior": "prior",
    "token_decoder": "token decoder",
    "text_encoder": "text tower",
    "vqgan": "Stage A",
    "image_encoder": "image encoder",
}
BUNDLE_OUTPUTS = (
    "prior", "decoder", "prior_text_encoder", "decoder_text_encoder", "vqgan", "image_encoder",
)  # fmt: skip
LOADERS: dict[str, tuple[str, str, dict[str, Any]]] = {  # node, its widget with the file's name, its other widgets
    "prior": ("WuerstchenModelLoader", "model_name", {"weight_dtype": "default", "version": "auto"}),
    "decoder": ("WuerstchenModelLoader", "model_name", {"weight_dtype": "default", "version": "auto"}),
    "token_decoder": ("WuerstchenTokenDecoderLoader", "model_name", {"weight_dtype": "default"}),
    "text_encoder": ("WuerstchenCLIPLoader", "clip_name", {}),
    "prior_text_encoder": ("WuerstchenCLIPLoader", "clip_name", {}),
    "decoder_text_encoder": ("WuerstchenCLIPLoader", "clip_name", {}),
    "vqgan": ("WuerstchenVAELoader", "vae_name", {}),
    "image_encoder": ("WuerstchenVAELoader", "vae_name", {}),
}
MAX_SEED = 2**53 - 1  # of the canvas, whose numbers are JavaScript's
MAX_STEPS, MAX_CFG, MAX_REUSE = 1000, 30.0, 100  # of the nodes
APPLY = "ControlNetApplyAdvanced"
HINT_WIDGETS = {"strength": "strength", "start": "start_percent", "end": "end_percent"}  # by name in a record
MAX_STRENGTH = 10.0  # of that node
# The canvas reads these as choices, comments and escapes, and some cannot be escaped.
SPECIAL = re.compile(r"[{}\\]|//|/\*")

Link = list[Any]


class NoGraph(Exception):
    """Raised for settings that the nodes do not have."""


class _Graph:
    def __init__(self) -> None:
        self.prompt: Prompt = {}
        self.titles: dict[str, str] = {}

    def add(self, class_type: str, title: str = "", /, **inputs: Any) -> str:
        """Adds a node and returns its id."""
        key = str(len(self.prompt) + 1)
        self.prompt[key] = {"class_type": class_type, "inputs": inputs}
        if title:
            self.titles[key] = title
        return key


def build_graph(record: Mapping[str, Any]) -> tuple[Prompt, dict[str, str]] | None:
    """Returns the graph of a picture's record as a prompt, and the titles of its nodes; None if nodes cannot repeat it.

    This is so for mixed prompts, interpolation and outpainting, other samplers than the schedule's, v2's decoder
    guidance with another end, and unknown files.
    """
    try:
        graph = _Graph()
        _add_nodes(graph, record)
    except NoGraph:
        return None
    return graph.prompt, graph.titles


def _add_nodes(graph: _Graph, record: Mapping[str, Any]) -> None:
    command, v1 = record.get("command", "generate"), "temperature" in record
    if command not in ("generate", "variations", "reconstruct"):
        raise NoGraph
    source = _components(graph, record, v1, with_image=command != "generate")
    towers = {"prior_clip": source["prior_text_encoder"], "decoder_clip": source["decoder_text_encoder"]}
    text = graph.add("WuerstchenTextEncode", "Prompt", **towers, text=escape(record["prompt"]))
    negative = graph.add("WuerstchenTextEncode", "Negative prompt", **towers, text=escape(record.get("negative", "")))
    if command == "generate":
        size = {"width": record["width"], "height": record["height"]}
        latents = graph.add("WuerstchenEmptyLatents", **size, batch_size=1)
    else:
        if "image" not in record or "resized" in record:
            raise NoGraph
        image = graph.add("LoadImage", image=record["image"])
        latents = graph.add("WuerstchenImageEncode", image_encoder=source["image_encoder"], image=[image, 0])
    if not 0 <= record["seed"] <= MAX_SEED:
        raise NoGraph
    seed: Link = [graph.add("PrimitiveInt", "Seed", value=record["seed"]), 0]
    features: Link = [latents, 0]
    if command != "reconstruct":
        features = [_add_prior(graph, record, source["prior"], text, negative, latents, seed), 0]
    cond = graph.add("WuerstchenDecoderConditioning", conditioning=[text, 1], stage_c=features)
    add_decoder = _add_token_decoder if v1 else _add_decoder
    stage_b = add_decoder(graph, record, source, cond, negative, latents, seed)
    picture = graph.add("WuerstchenVAEDecode", vae=source["vqgan"], stage_b=[stage_b, 0])
    graph.add("SaveImage", images=[picture, 0], filename_prefix="wuerstchen")


def _components(graph: _Graph, record: Mapping[str, Any], v1: bool, with_image: bool) -> dict[str, Link]:
    """Adds the loaders and returns the outputs of the components."""
    names: tuple[str, ...] = ("prior", "token_decoder", "text_encoder", "vqgan") if v1 else BUNDLE_OUTPUTS[:-1]
    names += ("image_encoder",) if with_image else ()
    model, found = record.get("model"), {}
    bundle = model and SHIPPED.get(model, model if model.endswith(".safetensors") else f"{model}.safetensors")
    files = {name: entry["file"] for name, entry in record.get("parts", {}).items()}
    if bundle and not v1:
        loader = graph.add("WuerstchenBundleLoader", bundle=bundle)
        found = {name: [loader, slot] for slot, name in enumerate(BUNDLE_OUTPUTS)}
    elif bundle:
        files = {name: f"{V1_LABELS[name]} of {bundle}" for name in names} | files
    for name, file in files.items():
        if name in (*names, "text_encoder", *TOWERS):
            node, widget, others = LOADERS[name]
            found[name] = [graph.add(node, name.replace("_", " "), **{widget: file}, **others), 0]
    if (shared := found.pop("text_encoder", None)) is not None:
        found |= {name: shared for name in TOWERS if name not in files}
    _add_loras(graph, record, found)
    if not {*names, *TOWERS} - {"text_encoder"} <= found.keys():
        raise NoGraph
    return found


def _add_loras(graph: _Graph, record: Mapping[str, Any], found: dict[str, Link]) -> None:
    """Adds a loader per LoRA behind the stage that it changes, and its text encoder."""
    for lora in record.get("loras", ()):
        stage = lora.get("stage", "prior")
        tower = f"{stage.removeprefix('token_')}_text_encoder"
        is_file = lora["file"] in SHIPPED or lora["file"].endswith((".safetensors", ".pt", ".bin"))
        if stage == "token_decoder" or not {stage, tower} <= found.keys() or not is_file:
            raise NoGraph
        name = SHIPPED.get(lora["file"], lora["file"])
        strengths = {"strength_model": lora["strength"], "strength_clip": lora["strength"], "save_converted": False}
        node = graph.add("WuerstchenLoraLoader", model=found[stage], clip=found[tower], lora_name=name, **strengths)
        found[stage], found[tower] = [node, 0], [node, 1]


def _add_prior(
    graph: _Graph, record: Mapping[str, Any], model: Link, text: str, negative: str, latents: str, seed: Link
) -> str:
    if record["sampler"] != SCHEDULES[record["schedule"]].sampler:
        raise NoGraph
    cond, uncond = _add_hints(graph, record, [text, 0], [negative, 0])
    return graph.add(
        "WuerstchenPriorSample",
        model=model,
        positive=cond,
        negative=uncond,
        stage_c=[latents, 0],
        schedule=record["schedule"],
        steps=_steps(record["prior_steps"]),
        cfg=_scale(record["prior_guidance"]),
        seed=seed,
        denoise=record.get("strength", 1.0),
    )


def _add_hints(graph: _Graph, record: Mapping[str, Any], cond: Link, uncond: Link) -> tuple[Link, Link]:
    """Adds a ControlNet and its picture per hint, and returns both conditionings with them."""
    for hint in record.get("control", ()):
        is_file = hint["file"] in SHIPPED or hint["file"].endswith(".safetensors")
        if "mask" in hint or not hint["image"] or not is_file or not 0 <= hint["strength"] <= MAX_STRENGTH:
            raise NoGraph
        net = graph.add("WuerstchenControlNetLoader", control_net_name=SHIPPED.get(hint["file"], hint["file"]))
        image = graph.add("LoadImage", "Hint", image=hint["image"])
        values = {widget: hint[name] for name, widget in HINT_WIDGETS.items()}
        links = {"positive": cond, "negative": uncond, "control_net": [net, 0], "image": [image, 0]}
        node = graph.add(APPLY, **links, **values)
        cond, uncond = [node, 0], [node, 1]
    return cond, uncond


def _add_decoder(
    graph: _Graph,
    record: Mapping[str, Any],
    source: Mapping[str, Link],
    cond: str,
    negative: str,
    latents: str,
    seed: Link,
) -> str:
    scale = _scale(record["decoder_guidance"])
    if _scale(record.get("decoder_guidance_end", scale)) != scale:
        raise NoGraph
    inputs = {"model": source["decoder"], "positive": [cond, 0], "stage_b": [latents, 1]}
    if scale > 1:
        inputs["negative"] = [negative, 1]
    steps, reuse = _steps(record["decoder_steps"]), _reuse(record)
    return graph.add("WuerstchenDecoderSample", **inputs, steps=steps, cfg=scale, seed=seed, denoise=1.0, reuse=reuse)


def _add_token_decoder(
    graph: _Graph,
    record: Mapping[str, Any],
    source: Mapping[str, Link],
    cond: str,
    negative: str,
    latents: str,
    seed: Link,
) -> str:
    first, last = record["temperature"]
    return graph.add(
        "WuerstchenTokenDecoderSample",
        token_decoder=source["token_decoder"],
        positive=[cond, 0],
        stage_b=[latents, 1],
        vae=source["vqgan"],
        negative=[negative, 1],
        steps=_steps(record["decoder_steps"]),
        cfg=_scale(record["decoder_guidance"]),
        cfg_end=0.0 if record.get("decoder_guidance_end") is None else _scale(record["decoder_guidance_end"]),
        temperature=first,
        temperature_end=last,
        mode=record["token_mode"],
        seed=seed,
        denoise=1.0,
        reuse=_reuse(record),
    )


def _steps(steps: int) -> int:
    if steps > MAX_STEPS:
        raise NoGraph
    return steps


def _reuse(record: Mapping[str, Any]) -> int:
    reuse: int = record.get("decoder_reuse", SamplingSettings.decoder_reuse)
    if reuse > MAX_REUSE:
        raise NoGraph
    return reuse


def _scale(guidance: float) -> float:
    """Returns the scale that the nodes and the core both understand: 1 for none."""
    if guidance > MAX_CFG:
        raise NoGraph
    return max(float(guidance), 1.0)


def escape(text: Any) -> str:
    """Returns a prompt for ComfyUI, which reads parentheses as weights. Raises NoGraph for mixes and other syntax."""
    if not isinstance(text, str) or SPECIAL.search(text):
        raise NoGraph
    if has_embedding(text):  # we read such prompts as ComfyUI does
        return text
    return re.sub(r"([()])", r"\\\1", text)

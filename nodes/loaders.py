"""Nodes that load models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io

from ..wuerstchen_core.checkpoints import Part
from ..wuerstchen_core.checkpoints.formats import LORA
from ..wuerstchen_core.checkpoints.read import open_source
from ..wuerstchen_core.checkpoints.sources import TOWERS, ForeignFile, Source
from ..wuerstchen_core.models.image_encoder import EFFICIENTNET_V2_L
from .host import clip, folders, models, vae
from .schema import schema

logger = logging.getLogger(__name__)

WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "default": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
V1_PRIOR_WIDTH = 1024


@dataclass(frozen=True)
class Shelf:
    """One loader: its node, the host's folder that it reads, and the parts that it takes from there."""

    node: str
    folder: str
    parts: tuple[str, ...]
    takes: str


MODEL = Shelf(
    "Würstchen Model Loader", "diffusion_models", ("prior", "decoder"), "a prior (Stage C) or v2's decoder (Stage B)"
)
TOKENS = Shelf("Würstchen Token Decoder Loader", MODEL.folder, ("token_decoder",), "v1's token decoder (Stage B)")
CLIP = Shelf("Würstchen CLIP Loader", "text_encoders", TOWERS, "CLIP-bigG or CLIP-H")
VAE = Shelf("Würstchen VAE Loader", "vae", ("vqgan", "image_encoder"), "Stage A or v2's image encoder")

_NAMES = {
    "prior": "a prior (Stage C)",
    "decoder": "a decoder (Stage B)",
    "token_decoder": "Stage B of Würstchen v1, which paints tokens",
    "vqgan": "Stage A",
    "image_encoder": "an image encoder",
    **dict.fromkeys(TOWERS, "a text tower"),
}
# By the width of its states, the stage whose name in LoRA and embedding files a tower goes by, whichever reads it.
_TOWER_BY_WIDTH = {1280: "prior_text_encoder", 1024: "decoder_text_encoder"}


def fingerprint(find: Callable[[str], Path], name: str | None) -> Any:
    """What changes when a file does."""
    if name is None:  # another node gives the name, and the host knows when that changes
        return None
    status = find(name).stat()
    return name, status.st_mtime_ns, status.st_size


def _check_version(name: str, metadata: dict[str, Any]) -> None:
    if metadata.get("version", "v2") != "v2":
        raise ValueError(
            f"{name!r} holds Würstchen {metadata['version']}, and this node loads v2 only: choose a v2 file"
        )


def _refusal(name: str, shelf: Shelf, found: tuple[str, ...], other: tuple[str, ...]) -> ValueError:
    """A sentence about a file without a part for the shelf: what it holds, and what takes that."""
    held = ", ".join(dict.fromkeys((*(_NAMES[part] for part in found), *other)))
    right = next((shelf for shelf in (MODEL, TOKENS, CLIP, VAE) if set(shelf.parts) & set(found)), None)
    if right is not None:
        advice = f"put it into the {right.folder} folder, for {right.node}"
    elif LORA in other:
        advice = "put it into the loras folder, for a LoRA loader"
    else:
        advice = "choose another file, and ComfyUI's own loaders for this one"
    return ValueError(f"{name!r} holds {held}, and {shelf.node} takes {shelf.takes}: {advice}")


def _open(name: str, shelf: Shelf) -> tuple[Source, str]:
    """A file of a shelf, and the name of its one part that belongs there."""
    try:
        source = open_source(folders.file_path(shelf.folder, name))
    except ForeignFile as error:
        raise _refusal(name, shelf, (), error.held) from error
    _check_version(name, source.metadata)
    # One tower may serve both stages.
    found = {id(source.networks[part]): part for part in reversed(shelf.parts) if part in source.networks}
    if not found:
        raise _refusal(name, shelf, tuple(source.networks), source.refused)
    if len(found) > 1:
        raise ValueError(
            f"{name!r} holds several parts of a model, and {shelf.node} takes one: put it into the checkpoints folder, "
            "for Würstchen Bundle Loader"
        )
    return source, next(iter(found.values()))


def _read(name: str, shelf: Shelf) -> Part:
    source, part = _open(name, shelf)
    return source.part(part)


class WuerstchenBundleLoader(io.ComfyNode):
    """All parts of a model from one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenBundleLoader",
            display_name="Würstchen Bundle Loader",
            category="Würstchen/loaders",
            description="Loads all parts of a Würstchen model from one file. The shipped demo needs no download.",
            search_aliases=["checkpoint loader", "load model", "demo", "stage a", "stage b", "stage c"],
            inputs=[
                io.Combo.Input(
                    "bundle",
                    options=folders.bundle_names(),
                    default=folders.DEMO,
                    tooltip="The small model that ships with these nodes, or a bundle from the checkpoints folder.",
                ),
            ],
            outputs=[
                io.Model.Output("prior", display_name="prior", tooltip="Stage C: text to semantic latents."),
                io.Model.Output("decoder", display_name="decoder", tooltip="Stage B: semantic latents to latents."),
                io.Clip.Output("prior_clip", display_name="prior clip", tooltip="The text tower that Stage C reads."),
                io.Clip.Output("decoder_clip", display_name="decoder clip", tooltip="The text tower of Stage B."),
                io.Vae.Output("vae", display_name="vae", tooltip="Stage A: latents to pictures and back."),
                io.Vae.Output(
                    "image_encoder",
                    display_name="image encoder",
                    tooltip="The semantic compressor: pictures to Stage C latents. It cannot decode.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, bundle: str | None) -> Any:
        return fingerprint(folders.bundle_path, bundle)

    @classmethod
    def execute(cls, bundle: str) -> io.NodeOutput:
        source = open_source(folders.bundle_path(bundle))
        _check_version(bundle, source.metadata)
        return io.NodeOutput(
            models.load_model(source.part("prior")),
            models.load_model(source.part("decoder")),
            clip.load_clip(source.part("prior_text_encoder"), source.metadata),
            clip.load_clip(source.part("decoder_text_encoder"), source.metadata),
            vae.load_stage_a(source.part("vqgan")),
            vae.load_image_encoder(source.part("image_encoder")),
        )


class WuerstchenModelLoader(io.ComfyNode):
    """Stage C or Stage B from a file of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenModelLoader",
            display_name=MODEL.node,
            category="Würstchen/loaders",
            description="Loads Würstchen's prior (Stage C) or decoder (Stage B), whichever the file holds.",
            search_aliases=["unet loader", "load diffusion model", "stage b", "stage c", "prior", "decoder"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.file_names(MODEL.folder),
                    tooltip="A prior or decoder in models/diffusion_models: the original's .pt, diffusers' file, what "
                    "ComfyUI's ModelSave wrote, or a bundle of that one part.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="How the weights are kept in memory. default: as ComfyUI thinks best; fp8 takes a quarter "
                    "of fp32's memory and loses some quality, since ComfyUI widens it again to compute.",
                ),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The prior or the decoder.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, weight_dtype: str | None) -> Any:
        return fingerprint(partial(folders.file_path, MODEL.folder), model_name)

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        part = _read(model_name, MODEL)
        if part.name == "prior" and part.params.c_cond == V1_PRIOR_WIDTH:
            logger.warning(
                f"{model_name!r} reads CLIP-H, as v2's first prior of June 2023 and v1's do: it is taken for v2's"
            )
        return io.NodeOutput(models.load_model(part, WEIGHT_DTYPES[weight_dtype]))


class WuerstchenCLIPLoader(io.ComfyNode):
    """A text tower from a file of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenCLIPLoader",
            display_name=CLIP.node,
            category="Würstchen/loaders",
            description="Loads a text tower: CLIP-bigG for v2's prior, CLIP-H for the decoder, told apart by size.",
            search_aliases=["text encoder", "clip-g", "bigg", "clip-h", "load clip"],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=folders.file_names(CLIP.folder),
                    tooltip="A text tower in models/text_encoders. For the prior, the clip_g of SDXL, SD3 or Stable "
                    "Cascade is right; for the decoder, LAION's CLIP-H. Stable Diffusion 2's lacks a layer.",
                ),
            ],
            outputs=[io.Clip.Output("clip", display_name="clip", tooltip="The text tower.")],
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name: str | None) -> Any:
        return fingerprint(partial(folders.file_path, CLIP.folder), clip_name)

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        source, name = _open(clip_name, CLIP)
        part = source.part(name)
        part = replace(part, name=_TOWER_BY_WIDTH.get(part.params.width, name))
        return io.NodeOutput(clip.load_clip(part, source.metadata))


class WuerstchenVAELoader(io.ComfyNode):
    """Stage A, or the semantic compressor, from a file of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenVAELoader",
            display_name=VAE.node,
            category="Würstchen/loaders",
            description="Loads Stage A, or the image encoder as a VAE that only encodes, whichever the file holds.",
            search_aliases=["stage a", "vqgan", "load vae"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=folders.file_names(VAE.folder),
                    tooltip="Stage A in models/vae: the original's vqgan_f4_v1_500k.pt, Stable Cascade's stage_a, or "
                    "diffusers' vqgan; or v2's image encoder.",
                ),
            ],
            outputs=[io.Vae.Output("vae", display_name="vae", tooltip="Latents to pictures and back.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str | None) -> Any:
        return fingerprint(partial(folders.file_path, VAE.folder), vae_name)

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        part = _read(vae_name, VAE)
        if part.name == "vqgan":
            return io.NodeOutput(vae.load_stage_a(part))
        if part.params.stages == EFFICIENTNET_V2_L:
            raise ValueError(f"{vae_name!r} holds the image encoder of Würstchen v1: take v2's, which is smaller")
        return io.NodeOutput(vae.load_image_encoder(part))

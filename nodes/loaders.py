"""Nodes that load models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..wuerstchen_core.checkpoints.components import (
    CLIP_LOADER,
    CONTROL_LOADER,
    MODEL_LOADER,
    TOKEN_LOADER,
    TOWERS,
    VAE_LOADER,
)
from ..wuerstchen_core.checkpoints.infer_params import CLIP_NAMES
from ..wuerstchen_core.checkpoints.open import open_source
from ..wuerstchen_core.checkpoints.release import VERSIONS
from ..wuerstchen_core.checkpoints.source import CHECKPOINT
from ..wuerstchen_core.common.devices import WEIGHT_DTYPES
from .host import clip, control, folders, models, vae
from .host.few_steps import notify_if_distilled
from .model_files import choices, find, fingerprint, is_v1, open_from, read_from
from .sampling_v1 import TokenDecoderType
from .schema import Node, schema

# By ComfyUI's name for fp8; "default" keeps int8 where it is fast, and else leaves the choice to ComfyUI.
DTYPE_CHOICES = {"default": None} | {
    {"fp8": "fp8_e4m3fn"}.get(name, name): dtype for name, dtype in WEIGHT_DTYPES.items()
}
# LoRA and embedding files name a text encoder by its width, whichever stage reads it.
_PART_BY_WIDTH = dict(zip(CLIP_NAMES, TOWERS, strict=True))


def _weight_dtype_input() -> io.Combo.Input:
    return io.Combo.Input("weight_dtype", options=list(DTYPE_CHOICES), default="default")


class WuerstchenBundleLoader(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenBundleLoader",
            category="loaders",
            search_aliases=["checkpoint loader", "load model", "demo", "stage a", "stage b", "stage c"],
            inputs=[io.Combo.Input("bundle", options=folders.bundle_names(), default=folders.DEMO)],
            outputs=[
                io.Model.Output("prior"),
                io.Model.Output("decoder"),
                io.Clip.Output("prior_clip"),
                io.Clip.Output("decoder_clip"),
                io.Vae.Output("vae"),
                io.Vae.Output("image_encoder"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, bundle: str | None) -> Any:
        return fingerprint(bundle and folders.bundle_path(bundle))

    @classmethod
    def execute(cls, bundle: str) -> io.NodeOutput:
        source = open_source(folders.bundle_path(bundle))
        if is_v1(source) or source.layout == CHECKPOINT:
            nodes = ", ".join(loader.node for loader in (MODEL_LOADER, TOKEN_LOADER, CLIP_LOADER, VAE_LOADER))
            holds = "Würstchen v1" if is_v1(source) else "one MODEL with its CLIP and VAE"
            raise ValueError(f"{bundle!r} holds {holds}, whose parts are loaded one by one: use {nodes}")
        notify_if_distilled(bundle, source.metadata)
        return io.NodeOutput(
            models.load_model(source.lazy_part("prior")),
            models.load_model(source.lazy_part("decoder")),
            clip.load_clip(source.lazy_part("prior_text_encoder"), source.metadata),
            clip.load_clip(source.lazy_part("decoder_text_encoder"), source.metadata),
            vae.load_stage_a(source.lazy_part("vqgan")),
            vae.load_image_encoder(source.lazy_part("image_encoder"), source.metadata.get("version")),
        )


class WuerstchenModelLoader(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenModelLoader",
            category="loaders",
            search_aliases=["unet loader", "load diffusion model", "stage b", "stage c", "prior", "decoder"],
            inputs=[
                io.Combo.Input("model_name", options=choices(MODEL_LOADER)),
                _weight_dtype_input(),
                io.Combo.Input("version", options=list(VERSIONS), default=VERSIONS[0], optional=True),
            ],
            outputs=[io.Model.Output("model")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, **_: Any) -> Any:
        return fingerprint(model_name and find(MODEL_LOADER, model_name)[0])

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str, version: str = "auto") -> io.NodeOutput:
        source, name = open_from(model_name, MODEL_LOADER, version)
        notify_if_distilled(model_name, source.metadata, [name])
        return io.NodeOutput(models.load_model(source.lazy_part(name), DTYPE_CHOICES[weight_dtype]))


class WuerstchenTokenDecoderLoader(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenTokenDecoderLoader",
            category="loaders",
            search_aliases=["unet loader", "load diffusion model", "stage b", "paella", "v1"],
            inputs=[io.Combo.Input("model_name", options=choices(TOKEN_LOADER)), _weight_dtype_input()],
            outputs=[TokenDecoderType.Output("token_decoder")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, **_: Any) -> Any:
        return fingerprint(model_name and find(TOKEN_LOADER, model_name)[0])

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(models.load_model(read_from(model_name, TOKEN_LOADER), DTYPE_CHOICES[weight_dtype]))


class WuerstchenCLIPLoader(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenCLIPLoader",
            category="loaders",
            search_aliases=["text encoder", "clip-g", "bigg", "clip-h", "load clip"],
            inputs=[io.Combo.Input("clip_name", options=choices(CLIP_LOADER))],
            outputs=[io.Clip.Output("clip")],
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name: str | None) -> Any:
        return fingerprint(clip_name and find(CLIP_LOADER, clip_name)[0])

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        source, name = open_from(clip_name, CLIP_LOADER)
        part = source.lazy_part(name)
        part = replace(part, name=_PART_BY_WIDTH.get(part.params.width, name))
        return io.NodeOutput(clip.load_clip(part, source.metadata))


class WuerstchenVAELoader(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenVAELoader",
            category="loaders",
            search_aliases=["stage a", "vqgan", "load vae"],
            inputs=[io.Combo.Input("vae_name", options=choices(VAE_LOADER))],
            outputs=[io.Vae.Output("vae")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str | None) -> Any:
        return fingerprint(vae_name and find(VAE_LOADER, vae_name)[0])

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        source, name = open_from(vae_name, VAE_LOADER)
        part = source.lazy_part(name)
        if name == "vqgan":
            return io.NodeOutput(vae.load_stage_a(part))
        return io.NodeOutput(vae.load_image_encoder(part, source.metadata.get("version")))


class WuerstchenControlNetLoader(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenControlNetLoader",
            category="loaders",
            search_aliases=["controlnet", "control net", "outline", "scribble", "canny", "hint"],
            inputs=[io.Combo.Input("control_net_name", options=choices(CONTROL_LOADER))],
            outputs=[io.ControlNet.Output("control_net")],
        )

    @classmethod
    def fingerprint_inputs(cls, control_net_name: str | None) -> Any:
        return fingerprint(control_net_name and find(CONTROL_LOADER, control_net_name)[0])

    @classmethod
    def execute(cls, control_net_name: str) -> io.NodeOutput:
        return io.NodeOutput(control.load_control(read_from(control_net_name, CONTROL_LOADER), control_net_name))

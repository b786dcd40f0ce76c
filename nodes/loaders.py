"""Nodes that load models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from comfy_api.latest import io

from ..wuerstchen_core.checkpoints.components import BUNDLE_LOADER, TOWERS
from ..wuerstchen_core.checkpoints.infer_params import CLIP_NAMES
from ..wuerstchen_core.checkpoints.open import open_source
from ..wuerstchen_core.checkpoints.release import VERSIONS
from ..wuerstchen_core.common.devices import WEIGHT_DTYPES
from .host import clip, folders, models, vae
from .model_files import CLIP, MODEL, TOKENS, VAE, choices, fingerprint, is_v1, open_from, path_of, read_from
from .sampling_v1 import TokenDecoderType
from .schema import schema

# By ComfyUI's name for fp8, "default" meaning that ComfyUI chooses.
DTYPE_CHOICES = {"default": None} | {
    {"fp8": "fp8_e4m3fn"}.get(name, name): dtype for name, dtype in WEIGHT_DTYPES.items()
}
# By the width of its states, the stage whose name in LoRA and embedding files a tower goes by, whichever reads it.
_TOWER_BY_WIDTH = dict(zip(CLIP_NAMES, TOWERS, strict=True))


def _weight_dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "weight_dtype",
        options=list(DTYPE_CHOICES),
        default="default",
        tooltip="How the weights are kept in memory. default: as ComfyUI thinks best; fp8 takes a quarter of fp32's "
        "memory and loses some quality, since ComfyUI widens it again to compute.",
    )


class WuerstchenBundleLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenBundleLoader",
            display_name=BUNDLE_LOADER.node,
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
        if is_v1(source):
            raise ValueError(
                f"{bundle!r} holds Würstchen v1, whose parts are loaded one by one: {MODEL.node}, {TOKENS.node}, "
                f"{CLIP.node} and {VAE.node} offer them by name"
            )
        return io.NodeOutput(
            models.load_model(source.part("prior")),
            models.load_model(source.part("decoder")),
            clip.load_clip(source.part("prior_text_encoder"), source.metadata),
            clip.load_clip(source.part("decoder_text_encoder"), source.metadata),
            vae.load_stage_a(source.part("vqgan")),
            vae.load_image_encoder(source.part("image_encoder"), source.metadata.get("version")),
        )


class WuerstchenModelLoader(io.ComfyNode):
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
                    options=choices(MODEL),
                    tooltip="A prior or decoder in models/diffusion_models: the original's .pt, diffusers' file, what "
                    "ComfyUI's ModelSave wrote, a bundle of that one part, or the prior of a v1 bundle.",
                ),
                _weight_dtype_input(),
                io.Combo.Input(
                    "version",
                    options=list(VERSIONS),
                    default=VERSIONS[0],
                    optional=True,
                    tooltip="Whose a prior is that reads CLIP-H and could be v1's, or that of v2's first upload of "
                    "June 2023. auto: a known file's own, else v1's. Other files need no answer.",
                ),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The prior or the decoder.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, weight_dtype: str | None, version: str | None = "auto") -> Any:
        return fingerprint(partial(path_of, MODEL), model_name)

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str, version: str = "auto") -> io.NodeOutput:
        part = read_from(model_name, MODEL, version)
        return io.NodeOutput(models.load_model(part, DTYPE_CHOICES[weight_dtype]))


class WuerstchenTokenDecoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenTokenDecoderLoader",
            display_name=TOKENS.node,
            category="Würstchen/loaders",
            description="Loads Stage B of Würstchen v1, which paints tokens of Stage A's codebook.",
            search_aliases=["unet loader", "load diffusion model", "stage b", "paella", "v1"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=choices(TOKENS),
                    tooltip="v1's Stage B in models/diffusion_models, such as the original's model_stage_b.pt; or the "
                    "token decoder of a v1 bundle in models/checkpoints.",
                ),
                _weight_dtype_input(),
            ],
            outputs=[
                TokenDecoderType.Output(
                    "token_decoder", display_name="token decoder", tooltip="For Würstchen Token Decoder Sample."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, weight_dtype: str | None) -> Any:
        return fingerprint(partial(path_of, TOKENS), model_name)

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(models.load_model(read_from(model_name, TOKENS), DTYPE_CHOICES[weight_dtype]))


class WuerstchenCLIPLoader(io.ComfyNode):
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
                    options=choices(CLIP),
                    tooltip="A text tower in models/text_encoders. For the prior, the clip_g of SDXL, SD3 or Stable "
                    "Cascade is right; for the decoder, LAION's CLIP-H. Stable Diffusion 2's lacks a layer.",
                ),
            ],
            outputs=[io.Clip.Output("clip", display_name="clip", tooltip="The text tower.")],
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name: str | None) -> Any:
        return fingerprint(partial(path_of, CLIP), clip_name)

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        source, name = open_from(clip_name, CLIP)
        part = source.part(name)
        part = replace(part, name=_TOWER_BY_WIDTH.get(part.params.width, name))
        return io.NodeOutput(clip.load_clip(part, source.metadata))


class WuerstchenVAELoader(io.ComfyNode):
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
                    options=choices(VAE),
                    tooltip="Stage A in models/vae: the original's vqgan_f4_v1_500k.pt, Stable Cascade's stage_a, or "
                    "diffusers' vqgan; or an image encoder: v1's is told from v2's by its size.",
                ),
            ],
            outputs=[io.Vae.Output("vae", display_name="vae", tooltip="Latents to pictures and back.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str | None) -> Any:
        return fingerprint(partial(path_of, VAE), vae_name)

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        source, name = open_from(vae_name, VAE)
        part = source.part(name)
        if name == "vqgan":
            return io.NodeOutput(vae.load_stage_a(part))
        return io.NodeOutput(vae.load_image_encoder(part, source.metadata.get("version")))

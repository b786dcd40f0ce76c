"""Nodes that load models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from comfy_api.latest import io

from ..wuerstchen_core.checkpoints.components import BUNDLE_NODE, TOWERS
from ..wuerstchen_core.checkpoints.infer_params import CLIP_NAMES
from ..wuerstchen_core.checkpoints.open import open_source
from ..wuerstchen_core.checkpoints.release import VERSIONS
from ..wuerstchen_core.common.devices import WEIGHT_DTYPES
from .host import clip, folders, models, vae
from .model_files import CLIP, MODEL, TOKENS, VAE, Loader, choices, fingerprint, is_v1, open_from, path_of, read_from
from .sampling_v1 import TokenDecoderType
from .schema import schema

# By ComfyUI's name for fp8; "default" leaves the choice to ComfyUI.
DTYPE_CHOICES = {"default": None} | {
    {"fp8": "fp8_e4m3fn"}.get(name, name): dtype for name, dtype in WEIGHT_DTYPES.items()
}
# LoRA and embedding files name a text encoder by its width, whichever stage reads it.
_PART_BY_WIDTH = dict(zip(CLIP_NAMES, TOWERS, strict=True))


def _weight_dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "weight_dtype",
        options=list(DTYPE_CHOICES),
        default="default",
        tooltip="Dtype of the weights in memory. default: ComfyUI's choice. fp8 needs a quarter of fp32's memory and "
        "loses some quality.",
    )


class WuerstchenBundleLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenBundleLoader",
            display_name=BUNDLE_NODE,
            category="Würstchen/loaders",
            description="Loads all parts of a Würstchen model from one file. The shipped demo needs no download.",
            search_aliases=["checkpoint loader", "load model", "demo", "stage a", "stage b", "stage c"],
            inputs=[
                io.Combo.Input(
                    "bundle",
                    options=folders.bundle_names(),
                    default=folders.DEMO,
                    tooltip="The shipped demo model, or a Würstchen bundle from models/checkpoints.",
                ),
            ],
            outputs=[
                io.Model.Output("prior", display_name="prior", tooltip="Stage C, for Würstchen Prior Sample."),
                io.Model.Output("decoder", display_name="decoder", tooltip="Stage B, for Würstchen Decoder Sample."),
                io.Clip.Output("prior_clip", display_name="prior clip", tooltip="The text encoder of Stage C."),
                io.Clip.Output("decoder_clip", display_name="decoder clip", tooltip="The text encoder of Stage B."),
                io.Vae.Output("vae", display_name="vae", tooltip="Stage A: decodes latents to images, and encodes."),
                io.Vae.Output(
                    "image_encoder",
                    display_name="image encoder",
                    tooltip="Encodes images to Stage C latents. It cannot decode.",
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
                f"{bundle!r} holds Würstchen v1, whose parts are loaded one by one: choose them in {MODEL.node}, "
                f"{TOKENS.node}, {CLIP.node} and {VAE.node}"
            )
        return io.NodeOutput(
            models.load_model(source.part("prior")),
            models.load_model(source.part("decoder")),
            clip.load_clip(source.part("prior_text_encoder"), source.metadata),
            clip.load_clip(source.part("decoder_text_encoder"), source.metadata),
            vae.load_stage_a(source.part("vqgan")),
            vae.load_image_encoder(source.part("image_encoder"), source.metadata.get("version")),
        )


class FileLoader(io.ComfyNode):
    """Base of the nodes that load one component from a file."""

    loader: ClassVar[Loader]
    input: ClassVar[str]

    @classmethod
    def file_schema(
        cls, node_id: str, description: str, search_aliases: list[str], tooltip: str, output: Any, *more_inputs: Any
    ) -> io.Schema:
        """Returns the schema of a node with the choice of a file, explained by `tooltip`, before `more_inputs`."""
        return schema(
            node_id=node_id,
            display_name=cls.loader.node,
            category="Würstchen/loaders",
            description=description,
            search_aliases=search_aliases,
            inputs=[io.Combo.Input(cls.input, options=choices(cls.loader), tooltip=tooltip), *more_inputs],
            outputs=[output],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return fingerprint(partial(path_of, cls.loader), inputs[cls.input])


class WuerstchenModelLoader(FileLoader):
    loader, input = MODEL, "model_name"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.file_schema(
            "WuerstchenModelLoader",
            "Loads Würstchen's prior (Stage C) or decoder (Stage B), whichever the file holds.",
            ["unet loader", "load diffusion model", "stage b", "stage c", "prior", "decoder"],
            "A prior or decoder in models/diffusion_models (original, diffusers, or ComfyUI's ModelSave), or the prior "
            "of a v1 bundle.",
            io.Model.Output("model", display_name="model", tooltip="The prior or the decoder."),
            _weight_dtype_input(),
            io.Combo.Input(
                "version",
                options=list(VERSIONS),
                default=VERSIONS[0],
                optional=True,
                tooltip="Release of a CLIP-H prior: v1, or v2's first upload (June 2023). auto recognises published "
                "files and otherwise assumes v1. Ignored for other files.",
            ),
        )

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str, version: str = "auto") -> io.NodeOutput:
        part = read_from(model_name, MODEL, version)
        return io.NodeOutput(models.load_model(part, DTYPE_CHOICES[weight_dtype]))


class WuerstchenTokenDecoderLoader(FileLoader):
    loader, input = TOKENS, "model_name"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.file_schema(
            "WuerstchenTokenDecoderLoader",
            "Loads Stage B of Würstchen v1, which generates tokens of Stage A's codebook.",
            ["unet loader", "load diffusion model", "stage b", "paella", "v1"],
            "v1's Stage B in models/diffusion_models, such as the original's model_stage_b.pt, or the token decoder of "
            "a v1 bundle.",
            TokenDecoderType.Output(
                "token_decoder", display_name="token decoder", tooltip="For Würstchen Token Decoder Sample."
            ),
            _weight_dtype_input(),
        )

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(models.load_model(read_from(model_name, TOKENS), DTYPE_CHOICES[weight_dtype]))


class WuerstchenCLIPLoader(FileLoader):
    loader, input = CLIP, "clip_name"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.file_schema(
            "WuerstchenCLIPLoader",
            "Loads a text encoder, recognised by its size: CLIP-bigG for v2's prior, CLIP-H for the rest.",
            ["text encoder", "clip-g", "bigg", "clip-h", "load clip"],
            "A text encoder in models/text_encoders: for v2's prior, the clip_g of SDXL, SD3 or Stable Cascade; "
            "otherwise LAION's CLIP-H. That of Stable Diffusion 2 lacks a layer.",
            io.Clip.Output("clip", display_name="clip", tooltip="The text encoder."),
        )

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        source, name = open_from(clip_name, CLIP)
        part = source.part(name)
        part = replace(part, name=_PART_BY_WIDTH.get(part.params.width, name))
        return io.NodeOutput(clip.load_clip(part, source.metadata))


class WuerstchenVAELoader(FileLoader):
    loader, input = VAE, "vae_name"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.file_schema(
            "WuerstchenVAELoader",
            "Loads Stage A, or an image encoder as a VAE that only encodes, whichever the file holds.",
            ["stage a", "vqgan", "load vae"],
            "Stage A in models/vae (the original's vqgan_f4_v1_500k.pt, Stable Cascade's stage_a, or diffusers' "
            "vqgan), or the image encoder of v1 or v2.",
            io.Vae.Output("vae", display_name="vae", tooltip="Stage A or the image encoder."),
        )

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        source, name = open_from(vae_name, VAE)
        part = source.part(name)
        if name == "vqgan":
            return io.NodeOutput(vae.load_stage_a(part))
        return io.NodeOutput(vae.load_image_encoder(part, source.metadata.get("version")))

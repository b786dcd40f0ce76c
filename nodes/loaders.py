"""Nodes that load models."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..wuerstchen_core.checkpoints import read_metadata, read_part
from .host import clip, folders, models, vae


class WuerstchenBundleLoader(io.ComfyNode):
    """All parts of a model from one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WuerstchenBundleLoader",
            display_name="Würstchen Bundle Loader",
            category="Würstchen/loaders",
            description="Loads all parts of a Würstchen model from one file. The shipped demo needs no download.",
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
        if bundle is None:  # another node gives the name, and the host knows when that changes
            return None
        status = folders.bundle_path(bundle).stat()
        return bundle, status.st_mtime_ns, status.st_size

    @classmethod
    def execute(cls, bundle: str) -> io.NodeOutput:
        path = folders.bundle_path(bundle)
        metadata = read_metadata(path)
        if metadata.get("version", "v2") != "v2":
            raise ValueError(
                f"{bundle!r} holds Würstchen {metadata['version']}, and this node loads v2 only: choose a v2 bundle"
            )
        return io.NodeOutput(
            models.load_model(read_part(path, "prior")),
            models.load_model(read_part(path, "decoder")),
            clip.load_clip(read_part(path, "prior_text_encoder"), metadata),
            clip.load_clip(read_part(path, "decoder_text_encoder"), metadata),
            vae.load_stage_a(read_part(path, "vqgan")),
            vae.load_image_encoder(read_part(path, "image_encoder")),
        )

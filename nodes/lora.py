"""The node that applies a LoRA."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io

from .host import folders
from .host.lora import apply_lora, write_converted
from .model_files import fingerprint
from .schema import schema

FOLDER = "loras"


def _strength_input(name: str, target: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=1.0,
        min=-100.0,
        max=100.0,
        step=0.01,
        tooltip=f"Strength of the LoRA's changes to {target}: 1 as trained, 0 none, below 0 the opposite.",
    )


class WuerstchenLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenLoraLoader",
            display_name="Würstchen LoRA Loader",
            category="Würstchen/loaders",
            description="Applies a LoRA from diffusers, OneTrainer, Kohya or ComfyUI; these nodes can be chained.",
            search_aliases=["lora", "load lora", "lycoris", "loha", "lokr", "dora", "onetrainer"],
            inputs=[
                io.Model.Input("model", tooltip="The model to change: usually the prior of a Würstchen loader."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The CLIP of the same stage. Needed only if the LoRA changes the text encoder.",
                ),
                io.Combo.Input(
                    "lora_name", options=folders.file_names(FOLDER), tooltip="A LoRA file from models/loras."
                ),
                _strength_input("strength_model", "the model"),
                _strength_input("strength_clip", "the CLIP"),
                io.Boolean.Input(
                    "save_converted",
                    default=False,
                    tooltip="Also writes the LoRA as NAME_comfyui.safetensors beside its file, for ComfyUI's own LoRA "
                    "loaders.",
                ),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="model", tooltip="The changed model."),
                io.Clip.Output("clip_out", display_name="clip", tooltip="The changed CLIP; empty without a CLIP."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **_: Any) -> Any:
        return fingerprint(partial(folders.file_path, FOLDER), lora_name)

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        save_converted: bool,
        clip: Any = None,
    ) -> io.NodeOutput:
        path = folders.file_path(FOLDER, lora_name)
        model, clip, state = apply_lora(model, clip, path, strength_model, strength_clip)
        if save_converted:
            write_converted(path, state)
        return io.NodeOutput(model, clip)

"""The node that applies a LoRA."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..wuerstchen_core.checkpoints.lora_config import PEFT_CONFIG
from .host import folders
from .host.lora import apply_lora, write_converted
from .model_files import fingerprint
from .schema import Node, schema


def _strength_input(name: str) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=-100.0, max=100.0, step=0.01)


class WuerstchenLoraLoader(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenLoraLoader",
            category="loaders",
            search_aliases=["lora", "load lora", "lycoris", "loha", "lokr", "dora", "onetrainer"],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip", optional=True),
                io.Combo.Input("lora_name", options=folders.file_names(folders.LORA_FOLDER)),
                _strength_input("strength_model"),
                _strength_input("strength_clip"),
                io.Boolean.Input("save_converted", default=False),
            ],
            outputs=[io.Model.Output("model_out"), io.Clip.Output("clip_out")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **_: Any) -> Any:
        if not lora_name:
            return None
        path = folders.file_path(folders.LORA_FOLDER, lora_name)
        config = path.with_name(PEFT_CONFIG)
        return fingerprint(path), fingerprint(config) if config.is_file() else None

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
        path = folders.file_path(folders.LORA_FOLDER, lora_name)
        model, clip, state = apply_lora(model, clip, path, strength_model, strength_clip)
        if save_converted:
            write_converted(path, state, folders.own_folder(folders.LORA_FOLDER, lora_name))
        return io.NodeOutput(model, clip)

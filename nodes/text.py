"""The node that encodes prompts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .schema import Node, schema


class WuerstchenTextEncode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenTextEncode",
            category="conditioning",
            search_aliases=["prompt", "clip text encode", "conditioning", "negative"],
            inputs=[
                io.Clip.Input("prior_clip"),
                io.Clip.Input("decoder_clip"),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True, default="a red apple on a blue background"
                ),
            ],
            outputs=[io.Conditioning.Output("prior"), io.Conditioning.Output("decoder")],
        )

    @classmethod
    def execute(cls, prior_clip: Any, decoder_clip: Any, text: str) -> io.NodeOutput:
        states = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for clip in (prior_clip, decoder_clip))
        return io.NodeOutput(*states)

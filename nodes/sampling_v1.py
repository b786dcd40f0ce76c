"""The node that samples Stage B of Würstchen v1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..wuerstchen_core.diffusion.token_sampler import MODES
from ..wuerstchen_core.inference.settings import V1
from .host.token_sampling import sample_token_stage
from .latents import STAGE_B, check_latent, tagged
from .schema import Node, denoise_input, reuse_input, schema, seed_input, steps_input, title
from .vae import check_stage_a

NODE = title("WuerstchenTokenDecoderSample")
TokenDecoderType = io.Custom("WUERSTCHEN_TOKEN_DECODER")


def _number(name: str, default: float, low: float, high: float) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=low, max=high, step=0.05)


class WuerstchenTokenDecoderSample(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        first, last = V1.temperature
        return schema(
            node_id="WuerstchenTokenDecoderSample",
            category="sampling",
            search_aliases=["stage b", "sampling", "paella", "v1", "tokens"],
            inputs=[
                TokenDecoderType.Input("token_decoder"),
                io.Conditioning.Input("positive"),
                io.Latent.Input("stage_b"),
                io.Vae.Input("vae"),
                steps_input(V1.decoder_steps),
                _number("cfg", V1.decoder_guidance, 1.0, 30.0),
                _number("cfg_end", 0.0, 0.0, 30.0),
                _number("temperature", first, 0.05, 10.0),
                _number("temperature_end", last, 0.05, 10.0),
                io.Combo.Input("mode", options=list(MODES), default=V1.token_mode),
                seed_input(),
                io.Conditioning.Input("negative", optional=True),
                denoise_input(),
                reuse_input(),
            ],
            outputs=[io.Latent.Output("stage_b_out")],
        )

    @classmethod
    def execute(
        cls,
        token_decoder: Any,
        positive: Any,
        stage_b: dict[str, Any],
        vae: Any,
        steps: int,
        cfg: float,
        cfg_end: float,
        temperature: float,
        temperature_end: float,
        mode: str,
        seed: int,
        negative: Any = None,
        denoise: float = 1.0,
        reuse: int = V1.decoder_reuse,
    ) -> io.NodeOutput:
        check_latent(stage_b, STAGE_B, NODE, denoise)
        check_stage_a(vae, NODE)
        if negative is None and max(cfg, cfg_end) > 1:
            raise ValueError(f"{NODE} needs a negative conditioning if cfg is not 1: connect one, or set cfg to 1")
        sampling = replace(
            V1,
            decoder_steps=steps,
            decoder_guidance=cfg,
            decoder_guidance_end=cfg_end or None,
            temperature=(temperature, temperature_end),
            token_mode=mode,
            decoder_reuse=reuse,
        )
        samples = sample_token_stage(token_decoder, vae, positive, negative, stage_b, sampling, seed, denoise)
        return io.NodeOutput(tagged(samples, STAGE_B, stage_b))

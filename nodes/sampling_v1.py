"""The node that samples v1's Stage B."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..wuerstchen_core.diffusion.token_sampler import MODES
from ..wuerstchen_core.inference.settings import V1
from .host.token_sampling import sample_token_stage
from .latents import STAGE_B, check_latent, tagged
from .sampling import check_start, denoise_input, seed_input
from .schema import schema
from .vae import check_stage_a

NODE = "Würstchen Token Decoder Sample"
TokenDecoderType = io.Custom("WUERSTCHEN_TOKEN_DECODER")


def _number(name: str, default: float, low: float, high: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=low, max=high, step=0.05, tooltip=tooltip)


class WuerstchenTokenDecoderSample(io.ComfyNode):
    """Stage B of v1."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        first, last = V1.temperature
        return schema(
            node_id="WuerstchenTokenDecoderSample",
            display_name=NODE,
            category="Würstchen/sampling",
            description="Stage B of Würstchen v1: paints what Stage C decided, as tokens of Stage A's codebook.",
            search_aliases=["stage b", "sampling", "paella", "v1", "tokens"],
            inputs=[
                TokenDecoderType.Input("token_decoder", tooltip="The output of Würstchen Token Decoder Loader."),
                io.Conditioning.Input("positive", tooltip="The output of Würstchen Decoder Conditioning."),
                io.Latent.Input(
                    "stage_b",
                    tooltip="The stage_b output of Würstchen Empty Latents, or of Würstchen Image Encode. Where a mask "
                    "is set, only what it covers is painted.",
                ),
                io.Vae.Input("vae", tooltip="Stage A, whose codebook says what the tokens stand for."),
                io.Int.Input(
                    "steps",
                    default=V1.decoder_steps,
                    min=1,
                    max=1000,
                    tooltip="Equal steps from random tokens to the picture.",
                ),
                _number(
                    "cfg",
                    V1.decoder_guidance,
                    1.0,
                    30.0,
                    "Classifier-free guidance of the first step: how much more the positive counts than the negative. "
                    "1 is none, and faster.",
                ),
                _number(
                    "cfg_end", 0.0, 0.0, 30.0, "Guidance of the last step, reached evenly. 0 keeps that of the first."
                ),
                _number(
                    "temperature",
                    first,
                    0.05,
                    10.0,
                    "How freely tokens are drawn in the first step: below 1 the likely ones are preferred.",
                ),
                _number("temperature_end", last, 0.05, 10.0, "The same for the last step, reached evenly."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=V1.token_mode,
                    tooltip="How tokens are chosen. multinomial: drawn by their probabilities; argmax: the likeliest; "
                    "quantised: the nearest to the mean of all.",
                ),
                seed_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The decoder output of a second Würstchen Text Encode; its text may be empty. Not needed "
                    "where cfg and cfg_end are 1.",
                ),
                denoise_input(
                    "How many of the tokens of the picture in stage_b are replaced by random ones at the start: at 0 "
                    "it stays as it is, at 1 it is ignored, and only what Stage C says of it counts."
                ),
            ],
            outputs=[io.Latent.Output("stage_b_out", display_name="stage_b", tooltip="For Würstchen VAE Decode.")],
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
    ) -> io.NodeOutput:
        check_start(check_latent(stage_b, STAGE_B, NODE), denoise, NODE, " with a vae at its vae input")
        check_stage_a(vae, NODE)
        if negative is None and max(cfg, cfg_end) > 1:
            raise ValueError(f"{NODE} needs a negative conditioning where cfg is not 1: connect one, or set cfg to 1")
        sampling = replace(
            V1,
            decoder_steps=steps,
            decoder_guidance=cfg,
            decoder_guidance_end=cfg_end or None,
            temperature=(temperature, temperature_end),
            token_mode=mode,
        )
        samples = sample_token_stage(token_decoder, vae, positive, negative, stage_b, sampling, seed, denoise)
        return io.NodeOutput(tagged(samples, STAGE_B, stage_b))

"""The node that samples Stage B of Würstchen v1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..wuerstchen_core.diffusion.token_sampler import MODES
from ..wuerstchen_core.inference.settings import V1
from .host.token_sampling import sample_token_stage
from .latents import STAGE_B, check_latent, tagged
from .schema import denoise_input, schema, seed_input, start_input, steps_input
from .vae import check_stage_a

NODE = "Würstchen Token Decoder Sample"
TokenDecoderType = io.Custom("WUERSTCHEN_TOKEN_DECODER")


def _number(name: str, default: float, low: float, high: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=low, max=high, step=0.05, tooltip=tooltip)


class WuerstchenTokenDecoderSample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        first, last = V1.temperature
        return schema(
            node_id="WuerstchenTokenDecoderSample",
            display_name=NODE,
            category="Würstchen/sampling",
            description="Stage B of Würstchen v1: generates tokens of Stage A's codebook from Stage C's latents.",
            search_aliases=["stage b", "sampling", "paella", "v1", "tokens"],
            inputs=[
                TokenDecoderType.Input("token_decoder", tooltip="The output of Würstchen Token Decoder Loader."),
                io.Conditioning.Input("positive", tooltip="The output of Würstchen Decoder Conditioning."),
                start_input(STAGE_B),
                io.Vae.Input("vae", tooltip="Stage A, whose codebook turns tokens into latents."),
                steps_input(V1.decoder_steps, "Number of equal steps: 8 as published. More steps take longer."),
                _number(
                    "cfg",
                    V1.decoder_guidance,
                    1.0,
                    30.0,
                    "Classifier-free guidance of the first step: higher values follow the prompt more closely. 1 turns "
                    "it off and halves the time.",
                ),
                _number(
                    "cfg_end", 0.0, 0.0, 30.0, "Guidance of the last step, reached linearly. 0 means the same as cfg."
                ),
                _number(
                    "temperature",
                    first,
                    0.05,
                    10.0,
                    "Sampling temperature of the first step: below 1, likely tokens "
                    "are preferred and images get smoother.",
                ),
                _number(
                    "temperature_end", last, 0.05, 10.0, "Sampling temperature of the last step, reached linearly."
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=V1.token_mode,
                    tooltip="How tokens are chosen. multinomial: drawn by probability, as published; argmax: the most "
                    "likely; quantised: the nearest to the mean of all codes.",
                ),
                seed_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The decoder output of a second Würstchen Text Encode; its text may be empty. Needed if "
                    "cfg or cfg_end is above 1.",
                ),
                denoise_input(
                    "Fraction of the tokens of the image in stage_b that start out random: 0 keeps the image, 1 uses "
                    "Stage C's latents alone. Use 1 for empty latents."
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
        )
        samples = sample_token_stage(token_decoder, vae, positive, negative, stage_b, sampling, seed, denoise)
        return io.NodeOutput(tagged(samples, STAGE_B, stage_b))

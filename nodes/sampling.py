"""Nodes that sample Stages C and B, and the node that passes Stage C's latents to Stage B."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..wuerstchen_core.diffusion.samplers import SAMPLERS
from ..wuerstchen_core.diffusion.schedule import SCHEDULES, linear_times, named_times, strength_times
from ..wuerstchen_core.inference.settings import SamplingSettings
from .host.conditioning import PRIOR_KEY, VERSION_KEY
from .host.models import DecoderModel, PriorModel
from .host.sampling import sample_stage, sampler_object, stage_sigmas
from .latents import STAGE_B, STAGE_C, check_latent, tagged
from .schema import cfg_input, denoise_input, schema, seed_input, start_input, steps_input

FAST = SCHEDULES["fast"]
CFG = "Classifier-free guidance: higher values follow the prompt more closely. 1 turns it off and halves the time."


def _schedule_inputs() -> list[io.Combo.Input | io.Int.Input]:
    return [
        io.Combo.Input(
            "schedule",
            options=list(SCHEDULES),
            default=SamplingSettings.schedule,
            tooltip="original: 20 + 10 steps as published; diffusers: that library's 29 steps; linear: `steps` equal "
            f"steps; fast: {FAST.steps} {FAST.sampler} steps (Stage B: {FAST.decoder_steps}), tested on the demo.",
        ),
        steps_input(20, "Number of steps of the linear schedule; the other schedules ignore it."),
    ]


def _check_model(model: Any, expected: type, node: str, output: str) -> None:
    if not isinstance(model.model, expected):
        stages = {PriorModel: "a prior (Stage C)", DecoderModel: "a decoder (Stage B)"}
        found = stages.get(type(model.model), f"another model ({type(model.model).__name__})")
        raise ValueError(f"{node} got {found}: connect the {output} output of a Würstchen loader")


class WuerstchenPriorSample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenPriorSample",
            display_name="Würstchen Prior Sample",
            category="Würstchen/sampling",
            description="Stage C: generates the image's content from text, with the original's DDPM sampler (DDIM for "
            "the fast schedule).",
            search_aliases=["ksampler", "stage c", "sampling", "ddpm"],
            inputs=[
                io.Model.Input("model", tooltip="The prior of a Würstchen loader."),
                io.Conditioning.Input("positive", tooltip="The prior output of Würstchen Text Encode."),
                io.Conditioning.Input(
                    "negative", tooltip="The prior output of a second Würstchen Text Encode; its text may be empty."
                ),
                start_input(STAGE_C),
                *_schedule_inputs(),
                cfg_input(4.0, CFG),
                seed_input(),
                denoise_input(
                    "How much of the image in stage_c is regenerated: 0 keeps it, 1 ignores it. The number of steps "
                    "stays the same. Use 1 for empty latents.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "stage_c_out", display_name="stage_c", tooltip="The content of the image, for Stage B."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        stage_c: dict[str, Any],
        schedule: str,
        steps: int,
        cfg: float,
        seed: int,
        denoise: float = 1.0,
    ) -> io.NodeOutput:
        node = "Würstchen Prior Sample"
        _check_model(model, PriorModel, node, "prior")
        check_latent(stage_c, STAGE_C, node, denoise)
        version = model.model.version
        if stage_c.get(VERSION_KEY, version) != version:
            raise ValueError(
                f"{node} got Stage C latents of Würstchen {stage_c[VERSION_KEY]} and a prior of {version}: "
                "use the image encoder and the prior of one release"
            )
        times = strength_times(named_times(schedule, steps), denoise)
        sampler = SCHEDULES[schedule].sampler
        samples = sample_stage(model, positive, negative, stage_c, times, cfg, seed, sampler)
        return io.NodeOutput(tagged(samples, STAGE_C, {**stage_c, VERSION_KEY: version}))


class WuerstchenDecoderConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenDecoderConditioning",
            display_name="Würstchen Decoder Conditioning",
            category="Würstchen/conditioning",
            description="Adds Stage C's latents to Stage B's conditioning. Masks, areas and step ranges can be set "
            "before or after this node.",
            search_aliases=["stage b conditioning", "stage c to stage b"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The decoder output of Würstchen Text Encode."),
                io.Latent.Input(
                    "stage_c", tooltip="The latents from Würstchen Prior Sample, or from Würstchen Image Encode."
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning_out", display_name="conditioning", tooltip="The positive of Würstchen Decoder Sample."
                )
            ],
        )

    @classmethod
    def execute(cls, conditioning: Any, stage_c: dict[str, Any]) -> io.NodeOutput:
        added = {PRIOR_KEY: check_latent(stage_c, STAGE_C, "Würstchen Decoder Conditioning")}
        if VERSION_KEY in stage_c:
            added[VERSION_KEY] = stage_c[VERSION_KEY]
        return io.NodeOutput([[states, {**options, **added}] for states, options in conditioning])


class WuerstchenDecoderSample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenDecoderSample",
            display_name="Würstchen Decoder Sample",
            category="Würstchen/sampling",
            description="Stage B: generates the image's details from Stage C's latents, with the original's DDPM "
            "sampler.",
            search_aliases=["ksampler", "stage b", "sampling", "ddpm"],
            inputs=[
                io.Model.Input("model", tooltip="The decoder of a Würstchen loader."),
                io.Conditioning.Input("positive", tooltip="The output of Würstchen Decoder Conditioning."),
                start_input(STAGE_B),
                steps_input(
                    12, f"Number of equal steps: 12 as published, {FAST.decoder_steps} with Stage C's fast schedule."
                ),
                cfg_input(1.0, CFG),
                seed_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The decoder output of a second Würstchen Text Encode; needed only if cfg is not 1.",
                ),
                denoise_input(
                    "How much of the image in stage_b is regenerated: 0 keeps it, 1 uses Stage C's latents alone. Use "
                    "1 for empty latents.",
                ),
            ],
            outputs=[io.Latent.Output("stage_b_out", display_name="stage_b", tooltip="For Würstchen VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        stage_b: dict[str, Any],
        steps: int,
        cfg: float,
        seed: int,
        negative: Any = None,
        denoise: float = 1.0,
    ) -> io.NodeOutput:
        node = "Würstchen Decoder Sample"
        _check_model(model, DecoderModel, node, "decoder")
        check_latent(stage_b, STAGE_B, node, denoise)
        if negative is None and cfg != 1.0:
            raise ValueError(f"{node} needs a negative conditioning if cfg is not 1: connect one, or set cfg to 1")
        times = strength_times(linear_times(steps), denoise)
        samples = sample_stage(model, positive, positive if negative is None else negative, stage_b, times, cfg, seed)
        return io.NodeOutput(tagged(samples, STAGE_B, stage_b))


class WuerstchenScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenScheduler",
            display_name="Würstchen Scheduler",
            category="Würstchen/sampling",
            description="The noise levels of Würstchen's schedules, for SamplerCustom.",
            search_aliases=["sigmas", "schedule", "steps", "noise levels"],
            inputs=[
                io.Model.Input("model", tooltip="The prior or decoder of a Würstchen loader."),
                *_schedule_inputs(),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="The sigmas of SamplerCustom.")],
        )

    @classmethod
    def execute(cls, model: Any, schedule: str, steps: int) -> io.NodeOutput:
        decoder_steps = SCHEDULES[schedule].decoder_steps
        if decoder_steps and isinstance(model.model, DecoderModel):
            return io.NodeOutput(stage_sigmas(model, linear_times(decoder_steps)))
        return io.NodeOutput(stage_sigmas(model, named_times(schedule, steps)))


class WuerstchenSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenSampler",
            display_name="Würstchen Sampler",
            category="Würstchen/sampling",
            description="The original's samplers, with its exact last step, for SamplerCustom.",
            search_aliases=[*SAMPLERS, "ksampler select", "sampler custom"],
            inputs=[
                io.Combo.Input(
                    "sampler_name",
                    options=list(SAMPLERS),
                    default=SamplingSettings.sampler,
                    optional=True,
                    tooltip="ddpm: as published; ddim: deterministic, for Stage C's fast schedule; dpmpp_2m: "
                    "DPM-Solver++(2M), deterministic and of second order.",
                )
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="The sampler of SamplerCustom.")],
        )

    @classmethod
    def execute(cls, sampler_name: str = SamplingSettings.sampler) -> io.NodeOutput:
        return io.NodeOutput(sampler_object(sampler_name))

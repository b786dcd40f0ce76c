"""Nodes that sample, and what connects the two stages."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..wuerstchen_core.diffusion.samplers import SAMPLERS
from ..wuerstchen_core.diffusion.schedule import SCHEDULES, linear_times, named_times, strength_times
from ..wuerstchen_core.inference.settings import LARGEST_SEED, SamplingSettings
from .host.conditioning import PRIOR_KEY, VERSION_KEY
from .host.models import DecoderModel, PriorModel
from .host.sampling import sample_stage, sampler_object, stage_sigmas
from .latents import STAGE_B, STAGE_C, check_latent, tagged
from .schema import schema

FAST = SCHEDULES["fast"]
SEED_MAX = LARGEST_SEED - 4096  # leaves room for the seeds of a batch


def seed_input() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=SEED_MAX,
        control_after_generate=True,
        tooltip="The same seed gives the same picture here and on Würstchen's command line.",
    )


def _cfg_input(default: float) -> io.Float.Input:
    return io.Float.Input(
        "cfg",
        default=default,
        min=1.0,
        max=30.0,
        step=0.1,
        tooltip="Classifier-free guidance: how much more the positive counts than the negative. 1 is none, and faster.",
    )


def _schedule_input() -> io.Combo.Input:
    return io.Combo.Input(
        "schedule",
        options=list(SCHEDULES),
        default=SamplingSettings.schedule,
        tooltip="original: 20 + 10 steps; diffusers: its 29 steps; linear: as many as `steps` says; "
        f"fast: {FAST.steps} steps of {FAST.sampler} ({FAST.decoder_steps} of Stage B), measured for the demo only.",
    )


def _steps_input() -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=20,
        min=1,
        max=1000,
        tooltip="Steps of the linear schedule; the other schedules have their own number.",
    )


def denoise_input(tooltip: str) -> io.Float.Input:
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, tooltip=tooltip)


def check_start(samples: Tensor, denoise: float, node: str, more: str) -> None:
    if denoise < 1 and not samples.any():
        raise ValueError(
            f"{node} was given empty latents, of which a denoise of {denoise:g} would keep a part: set denoise to 1, "
            f"or connect Würstchen Image Encode{more}"
        )


def _check_model(model: Any, wanted: type, node: str, output: str) -> None:
    if not isinstance(model.model, wanted):
        given = {PriorModel: "a prior (Stage C)", DecoderModel: "a decoder (Stage B)"}
        kind = given.get(type(model.model), f"another model ({type(model.model).__name__})")
        raise ValueError(f"{node} was given {kind}: connect the {output} output of a Würstchen loader")


class WuerstchenPriorSample(io.ComfyNode):
    """Stage C."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenPriorSample",
            display_name="Würstchen Prior Sample",
            category="Würstchen/sampling",
            description="Stage C: decides what the picture shows, by the original's DDPM, or DDIM if it is to be fast.",
            search_aliases=["ksampler", "stage c", "sampling", "ddpm"],
            inputs=[
                io.Model.Input("model", tooltip="The prior of a Würstchen loader."),
                io.Conditioning.Input("positive", tooltip="The prior output of Würstchen Text Encode."),
                io.Conditioning.Input(
                    "negative", tooltip="The prior output of a second Würstchen Text Encode; its text may be empty."
                ),
                io.Latent.Input(
                    "stage_c",
                    tooltip="The stage_c output of Würstchen Empty Latents, or, to start from a picture, of Würstchen "
                    "Image Encode. Where a mask is set, only what it covers is painted.",
                ),
                _schedule_input(),
                _steps_input(),
                _cfg_input(4.0),
                seed_input(),
                denoise_input(
                    "How much of the picture in stage_c is painted anew: at 0 it stays as it is, at 1 it is ignored. "
                    "The number of steps stays the same.",
                ),
            ],
            outputs=[io.Latent.Output("stage_c_out", display_name="stage_c", tooltip="What the picture shows.")],
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
        check_start(check_latent(stage_c, STAGE_C, node), denoise, node, "")
        version = model.model.version
        if stage_c.get(VERSION_KEY, version) != version:
            raise ValueError(
                f"{node} was given Stage C latents of Würstchen {stage_c[VERSION_KEY]} and a prior of {version}: "
                "take the image encoder and the prior of one release"
            )
        times = strength_times(named_times(schedule, steps), denoise)
        name = SCHEDULES[schedule].sampler
        samples = sample_stage(model, positive, negative, stage_c, times, cfg, seed, name)
        return io.NodeOutput(tagged(samples, STAGE_C, {**stage_c, VERSION_KEY: version}))


class WuerstchenDecoderConditioning(io.ComfyNode):
    """From Stage C to Stage B."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenDecoderConditioning",
            display_name="Würstchen Decoder Conditioning",
            category="Würstchen/conditioning",
            description="Gives Stage B what Stage C decided, beside the text. Masks, areas and step ranges may be set "
            "before it or after it.",
            search_aliases=["stage b conditioning", "stage c to stage b"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The decoder output of Würstchen Text Encode."),
                io.Latent.Input("stage_c", tooltip="The latents that Würstchen Prior Sample painted."),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning_out", display_name="conditioning", tooltip="The positive of Würstchen Decoder Sample."
                )
            ],
        )

    @classmethod
    def execute(cls, conditioning: Any, stage_c: dict[str, Any]) -> io.NodeOutput:
        prior = check_latent(stage_c, STAGE_C, "Würstchen Decoder Conditioning")
        given = {PRIOR_KEY: prior, **{key: stage_c[key] for key in (VERSION_KEY,) if key in stage_c}}
        return io.NodeOutput([[states, {**options, **given}] for states, options in conditioning])


class WuerstchenDecoderSample(io.ComfyNode):
    """Stage B."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenDecoderSample",
            display_name="Würstchen Decoder Sample",
            category="Würstchen/sampling",
            description="Stage B: paints what Stage C decided, with the original's DDPM sampler.",
            search_aliases=["ksampler", "stage b", "sampling", "ddpm"],
            inputs=[
                io.Model.Input("model", tooltip="The decoder of a Würstchen loader."),
                io.Conditioning.Input("positive", tooltip="The output of Würstchen Decoder Conditioning."),
                io.Latent.Input(
                    "stage_b",
                    tooltip="The stage_b output of Würstchen Empty Latents, or of Würstchen Image Encode. Where a mask "
                    "is set, only what it covers is painted.",
                ),
                io.Int.Input(
                    "steps",
                    default=12,
                    min=1,
                    max=1000,
                    tooltip=f"Equal steps from noise to the picture; {FAST.decoder_steps} go with the fast schedule.",
                ),
                _cfg_input(1.0),
                seed_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The decoder output of a second Würstchen Text Encode; needed only where cfg is not 1.",
                ),
                denoise_input(
                    "How much of the picture in stage_b is painted anew: at 0 it stays as it is, at 1 it is ignored, "
                    "and only what Stage C says of it counts.",
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
        check_start(check_latent(stage_b, STAGE_B, node), denoise, node, " with a vae at its vae input")
        if negative is None and cfg != 1.0:
            raise ValueError(f"{node} needs a negative conditioning where cfg is not 1: connect one, or set cfg to 1")
        times = strength_times(linear_times(steps), denoise)
        samples = sample_stage(model, positive, positive if negative is None else negative, stage_b, times, cfg, seed)
        return io.NodeOutput(tagged(samples, STAGE_B, stage_b))


class WuerstchenScheduler(io.ComfyNode):
    """The schedules, for the host's own samplers."""

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
                _schedule_input(),
                _steps_input(),
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
    """The original's sampler, for the host's own nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenSampler",
            display_name="Würstchen Sampler",
            category="Würstchen/sampling",
            description="The original's samplers, last step included, for SamplerCustom.",
            search_aliases=[*SAMPLERS, "ksampler select", "sampler custom"],
            inputs=[
                io.Combo.Input(
                    "sampler_name",
                    options=list(SAMPLERS),
                    default=SamplingSettings.sampler,
                    optional=True,
                    tooltip="ddpm: as published; ddim: deterministic, for the fast schedule of Stage C; dpmpp_2m: "
                    "DPM-Solver++(2M), deterministic and of second order.",
                )
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="The sampler of SamplerCustom.")],
        )

    @classmethod
    def execute(cls, sampler_name: str = SamplingSettings.sampler) -> io.NodeOutput:
        return io.NodeOutput(sampler_object(sampler_name))

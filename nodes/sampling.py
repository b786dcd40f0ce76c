"""Nodes that sample Stages C and B, and the node that passes Stage C's latents to Stage B."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..wuerstchen_core.diffusion.samplers import SAMPLERS
from ..wuerstchen_core.diffusion.schedule import SCHEDULES, decoder_times, named_times, strength_times
from ..wuerstchen_core.inference.settings import SamplingSettings
from .host.conditioning import PRIOR_KEY, VERSION_KEY
from .host.models import DecoderModel, PriorModel
from .host.notices import notify
from .host.sampling import sample_stage, sampler_object, stage_sigmas
from .latents import STAGE_B, STAGE_C, check_latent, tagged
from .schema import Node, cfg_input, denoise_input, reuse_input, schema, seed_input, steps_input, title


def _schedule_input() -> io.Combo.Input:
    return io.Combo.Input("schedule", options=list(SCHEDULES), default=SamplingSettings.schedule)


def _notify_of_steps(schedule: str, steps: int, *fixed: int | None) -> None:
    """Notifies if `steps` differs from the `fixed` numbers of steps that a schedule has."""
    if fixed[0] and steps not in fixed:
        notify(
            f"the schedule {schedule!r} has {fixed[0]} steps and ignores steps = {steps}: "
            "choose 'linear' for another number"
        )


def _check_model(model: Any, expected: type, node: str, output: str) -> None:
    if not isinstance(model.model, expected):
        stages = {PriorModel: "a prior (Stage C)", DecoderModel: "a decoder (Stage B)"}
        found = stages.get(type(model.model), f"another model ({type(model.model).__name__})")
        raise ValueError(f"{node} got {found}: connect the {output} output of a Würstchen loader")


class WuerstchenPriorSample(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenPriorSample",
            category="sampling",
            search_aliases=["ksampler", "stage c", "sampling", "ddpm"],
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("stage_c"),
                _schedule_input(),
                steps_input(20),
                cfg_input(4.0),
                seed_input(),
                denoise_input(),
            ],
            outputs=[io.Latent.Output("stage_c_out")],
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
        node = title("WuerstchenPriorSample")
        _check_model(model, PriorModel, node, "prior")
        check_latent(stage_c, STAGE_C, node, denoise)
        version = model.model.version
        if stage_c.get(VERSION_KEY, version) != version:
            raise ValueError(
                f"{node} got Stage C latents of Würstchen {stage_c[VERSION_KEY]} and a prior of {version}: "
                "use the image encoder and the prior of one release"
            )
        _notify_of_steps(schedule, steps, SCHEDULES[schedule].steps)
        times = strength_times(named_times(schedule, steps), denoise)
        sampler = SCHEDULES[schedule].sampler
        samples = sample_stage(
            model, positive, negative, stage_c, times, cfg, seed, sampler=sampler, from_noise=denoise == 1
        )
        return io.NodeOutput(tagged(samples, STAGE_C, {**stage_c, VERSION_KEY: version}))


class WuerstchenDecoderConditioning(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenDecoderConditioning",
            category="conditioning",
            search_aliases=["stage b conditioning", "stage c to stage b"],
            inputs=[io.Conditioning.Input("conditioning"), io.Latent.Input("stage_c")],
            outputs=[io.Conditioning.Output("conditioning_out")],
        )

    @classmethod
    def execute(cls, conditioning: Any, stage_c: dict[str, Any]) -> io.NodeOutput:
        added = {PRIOR_KEY: check_latent(stage_c, STAGE_C, title("WuerstchenDecoderConditioning"))}
        if VERSION_KEY in stage_c:
            added[VERSION_KEY] = stage_c[VERSION_KEY]
        return io.NodeOutput([[states, {**options, **added}] for states, options in conditioning])


class WuerstchenDecoderSample(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenDecoderSample",
            category="sampling",
            search_aliases=["ksampler", "stage b", "sampling", "ddpm"],
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Latent.Input("stage_b"),
                steps_input(12),
                cfg_input(1.0),
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
        model: Any,
        positive: Any,
        stage_b: dict[str, Any],
        steps: int,
        cfg: float,
        seed: int,
        negative: Any = None,
        denoise: float = 1.0,
        reuse: int = SamplingSettings.decoder_reuse,
    ) -> io.NodeOutput:
        node = title("WuerstchenDecoderSample")
        _check_model(model, DecoderModel, node, "decoder")
        check_latent(stage_b, STAGE_B, node, denoise)
        if negative is None and cfg != 1.0:
            raise ValueError(f"{node} needs a negative conditioning if cfg is not 1: connect one, or set cfg to 1")
        times = decoder_times(steps, denoise)
        negative = positive if negative is None else negative
        samples = sample_stage(
            model, positive, negative, stage_b, times, cfg, seed, from_noise=denoise == 1, reuse=reuse
        )
        return io.NodeOutput(tagged(samples, STAGE_B, stage_b))


class WuerstchenScheduler(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenScheduler",
            category="sampling",
            search_aliases=["sigmas", "schedule", "steps", "noise levels"],
            inputs=[io.Model.Input("model"), _schedule_input(), steps_input(20)],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model: Any, schedule: str, steps: int) -> io.NodeOutput:
        prior_steps, decoder_steps = SCHEDULES[schedule].steps, SCHEDULES[schedule].decoder_steps
        if isinstance(model.model, DecoderModel) and (decoder_steps or not prior_steps):
            _notify_of_steps(schedule, steps, decoder_steps, prior_steps)
            return io.NodeOutput(stage_sigmas(model, decoder_times(decoder_steps or steps)))
        _notify_of_steps(schedule, steps, prior_steps)
        return io.NodeOutput(stage_sigmas(model, named_times(schedule, steps)))


class WuerstchenSampler(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = SamplingSettings.sampler
        return schema(
            node_id="WuerstchenSampler",
            category="sampling",
            search_aliases=[*SAMPLERS, "ksampler select", "sampler custom"],
            inputs=[io.Combo.Input("sampler_name", options=list(SAMPLERS), default=default, optional=True)],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, sampler_name: str = SamplingSettings.sampler) -> io.NodeOutput:
        return io.NodeOutput(sampler_object(sampler_name))

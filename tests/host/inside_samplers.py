"""Run by ComfyUI's Python, `inside_samplers.py COMFYUI BUNDLE OUTPUT`: both stages in ComfyUI's sampling nodes, for
test_host_samplers.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

STAGES = ("prior", "decoder")
SHAPES = {"prior": (2, 16, 3, 4), "decoder": (2, 4, 16, 16)}
CFG = {"prior": 3.0, "decoder": 1.0}
SEED, SPLIT_SEED, STEPS, HALF = 11, 23, 6, 3
COUNTS = (1, 2, 10, 12, 20, 30, 60, 200, 1000, 1500)  # steps of the schedules
LONG = ("lms", "deis", "res_multistep", "dpmpp_2m")  # they divide by differences of noise levels
MANY = 200  # steps, of which the first and the last have nearly equal noise levels


def first(result: Any) -> Any:
    """Returns a node's first output, in the form of any ComfyUI version."""
    return getattr(result, "result", result)[0]


def ends(schedule: Tensor) -> Tensor:
    """Returns the first and the last eight values of a schedule."""
    return torch.cat([schedule[:8], schedule[-8:]])


def conditions(stage: str, widths: dict[str, int]) -> tuple[Any, Any]:
    """Returns positive and negative of a stage; both have Stage C latents in Stage B."""
    options = {"stable_cascade_prior": seeded(2, 16, 2, 2)} if stage == "decoder" else {}
    text, negative = seeded(2, 77, widths[stage]), seeded(2, 77, widths[stage]).roll(1, -1)
    return [[text, options]], [[negative, options]]


class Nodes:
    """ComfyUI's sampling nodes around one stage's model, recording the inputs of its network."""

    def __init__(self, patcher: Any, stage: str, widths: dict[str, int]):
        self.patcher, self.cfg = patcher, CFG[stage]
        self.positive, self.negative = conditions(stage, widths)
        self.latent = {"samples": torch.zeros(SHAPES[stage])}
        self.inputs: list[tuple[Tensor, Tensor]] = []
        patcher.model.diffusion_model.register_forward_pre_hook(self._record)

    def _record(self, _: Any, args: tuple[Tensor, ...]) -> None:
        self.inputs.append((args[0][:2].clone(), args[1][0].clone()))

    def times(self) -> Tensor:
        """Returns the times of all calls since the last call of this method."""
        times = torch.stack([t for _, t in self.inputs])
        self.inputs.clear()
        return times

    def custom(self, sampler: Any, sigmas: Tensor, seed: int = SEED) -> Tensor:
        from comfy_extras.nodes_custom_sampler import SamplerCustom

        inputs = (self.patcher, True, seed, self.cfg, self.positive, self.negative, sampler, sigmas, self.latent)
        return first(SamplerCustom().sample(*inputs))["samples"]

    def advanced(self, sampler: Any, sigmas: Tensor, guided: bool = True) -> Tensor:
        from comfy_extras import nodes_custom_sampler as comfy_nodes

        guider = (
            comfy_nodes.CFGGuider().get_guider(self.patcher, self.positive, self.negative, self.cfg)
            if guided
            else comfy_nodes.BasicGuider().get_guider(self.patcher, self.positive)
        )
        noise = first(comfy_nodes.RandomNoise().get_noise(SEED))
        return first(comfy_nodes.SamplerCustomAdvanced().sample(noise, first(guider), sampler, sigmas, self.latent))[
            "samples"
        ]

    def split(self, sampler: Any, sigmas: Tensor) -> Tensor:
        """Samples in two runs; the second starts from the first's leftover noise."""
        from comfy_extras import nodes_custom_sampler as comfy_nodes

        halves = comfy_nodes.SplitSigmas().get_sigmas(sigmas, HALF)
        early, late = getattr(halves, "result", halves)
        leftover = {"samples": self.custom(sampler, early)}
        common = (self.cfg, self.positive, self.negative, sampler, late, leftover)
        return first(comfy_nodes.SamplerCustom().sample(self.patcher, False, SPLIT_SEED, *common))["samples"]

    def ksampler(self, name: str, scheduler: str, steps: int, latent: Any = None, denoise: float = 1.0) -> Tensor:
        import nodes

        common = (name, scheduler, self.positive, self.negative, latent or self.latent, denoise)
        return nodes.KSampler().sample(self.patcher, SEED, steps, self.cfg, *common)[0]["samples"]

    def halves(self, name: str, scheduler: str) -> Tensor:
        import nodes

        def half(noise: str, latent: Any, start: int, end: int, leftover: str) -> Any:
            common = (self.cfg, name, scheduler, self.positive, self.negative, latent, start, end, leftover)
            return nodes.KSamplerAdvanced().sample(self.patcher, noise, SEED, STEPS, *common)[0]

        left = half("enable", self.latent, 0, HALF, "enable")
        return half("disable", left, HALF, 10_000, "disable")["samples"]


def runs(nodes: Nodes, stage: str) -> dict[str, Tensor]:
    """Samples one stage with each of ComfyUI's nodes."""
    import comfy.sample
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import BasicScheduler, KSamplerSelect
    from pack.nodes.sampling import WuerstchenSampler, WuerstchenScheduler
    from pack.wuerstchen_core.diffusion.samplers import seeded_noise

    sigmas = first(WuerstchenScheduler.execute(nodes.patcher, "linear", STEPS))
    ours = first(WuerstchenSampler.execute())
    multistep = first(WuerstchenSampler.execute("dpmpp_2m"))
    basic = first(BasicScheduler().get_sigmas(nodes.patcher, "simple", STEPS, 1.0))
    draw = seeded_noise(SEED + 1, 2)
    same_noise = {"noise_sampler": lambda sigma, following: draw(nodes.latent["samples"])}
    results = {
        "noise": comfy.sample.prepare_noise(nodes.latent["samples"], SEED),
        "custom": nodes.custom(ours, sigmas),
        "basic schedule": nodes.custom(ours, basic),
        "advanced": nodes.advanced(ours, sigmas),
        "unguided": nodes.advanced(ours, sigmas, guided=False),
        "split": nodes.split(ours, sigmas),
        "ddpm": nodes.custom(comfy.samplers.ksampler("ddpm", same_noise), basic),
        "selected ddpm": nodes.custom(first(KSamplerSelect().get_sampler("ddpm")), basic),
        "whole": nodes.ksampler("euler", "simple", STEPS),
        "halves": nodes.halves("euler", "simple"),
        "one step": nodes.custom(ours, first(WuerstchenScheduler.execute(nodes.patcher, "linear", 1))),
        "fast": nodes.custom(
            first(WuerstchenSampler.execute("ddim")), first(WuerstchenScheduler.execute(nodes.patcher, "fast", STEPS))
        ),
        "multistep": nodes.custom(multistep, sigmas),
        "multistep again": nodes.custom(multistep, sigmas),  # the same SAMPLER: it must not keep state
        "repeated sigmas": nodes.custom(ours, basic.repeat_interleave(2)),
        "large seed": nodes.custom(ours, basic, 2**64 - 1),
    }
    nodes.inputs.clear()
    nodes.ksampler("ddpm", "simple", 20)
    results["times"] = nodes.times()
    results["latent"] = seeded(*SHAPES[stage])
    nodes.ksampler("euler", "simple", 5, {"samples": results["latent"]}, denoise=0.5)
    results["denoise input"], results["denoise times"] = nodes.inputs[0][0], nodes.times()
    return results


def schedules(sampling: Any) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Returns the times of `simple` schedules, and facts about the sigmas of all of ComfyUI's schedulers."""
    import comfy.samplers

    tensors, facts = {}, {}
    for name in comfy.samplers.KSampler.SCHEDULERS:
        for steps in COUNTS:
            sigmas = comfy.samplers.calculate_sigmas(sampling, name, steps)
            falls = bool((sigmas.diff() < 0).all())
            facts[f"{name} {steps}"] = {"first": float(sigmas[0] / sampling.sigma_max), "falls": falls}
            facts[f"{name} {steps}"]["time"] = float(sampling.timestep(sigmas[:1]))
            if name == "simple":
                tensors[f"simple/{steps}"] = sampling.timestep(sigmas[:-1])
    return tensors, facts


def warnings(load: Callable[[str], Nodes]) -> list[list[str]]:
    """Returns the log of each of several runs."""
    from comfy.samplers import sampler_object
    from pack.nodes.sampling import WuerstchenSampler

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pack.nodes.host.notices").addHandler(handler)

    def lines(nodes: Nodes, sampler: Any, *sigmas: float) -> list[str]:
        messages.clear()
        nodes.custom(sampler, torch.tensor([*sigmas, 0.0]))
        return [*messages]

    nodes = load("decoder")
    clone = load("decoder")
    clone.patcher = nodes.patcher.clone()
    euler, ddpm = sampler_object("euler"), sampler_object("ddpm")
    return [
        lines(nodes, ddpm, 100.0, 1.0),
        lines(nodes, first(WuerstchenSampler.execute()), 100.0, 1.0),
        lines(nodes, euler, 100.0, 1.0),
        lines(nodes, euler, 100.0, 1.0),
        lines(clone, euler, 100.0, 1.0),
        lines(load("decoder"), euler, 100.0, 1.0),
        lines(load("prior"), euler, 100.0, 1.0),
        lines(load("prior"), euler, float("nan")),
        lines(load("prior"), ddpm, 100.0, 18.0),
    ]


def each_sampler(nodes: Nodes) -> dict[str, dict[str, bool]]:
    """Returns for each sampler: is the result finite, does it depend on the seed of the steps, is there a warning."""
    import comfy.sample
    import comfy.samplers
    from pack.nodes.host.sampler_warnings import NO_NEW_NOISE, warning

    sigmas = comfy.samplers.calculate_sigmas(nodes.patcher.get_model_object("model_sampling"), "simple", 3)
    noise, facts = seeded(*nodes.latent["samples"].shape), {}
    for name in comfy.samplers.KSampler.SAMPLERS:
        sampler = comfy.samplers.sampler_object(name)
        common = (1.0, sampler, sigmas, nodes.positive, nodes.negative, nodes.latent["samples"])
        a, b = (comfy.sample.sample_custom(nodes.patcher, noise.clone(), *common, seed=seed) for seed in (1, 2))
        facts[name] = {"finite": bool(a.isfinite().all()), "random": not torch.equal(a, b)}
        facts[name]["warned"] = warning(sampler, sigmas, ancestral=True) == NO_NEW_NOISE
    return facts


def main(bundle: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import comfy.k_diffusion.sampling
    import comfy.samplers
    from comfy_extras.nodes_model_advanced import ModelSamplingStableCascade

    def tables() -> tuple[list[str], ...]:
        samplers = comfy.samplers
        names = [*samplers.KSampler.SAMPLERS], [*samplers.KSampler.SCHEDULERS]
        return *names, dir(samplers), dir(comfy.k_diffusion.sampling)

    before = tables()
    load_pack()
    from pack.nodes.host import models
    from pack.nodes.sampling import WuerstchenSampler
    from pack.wuerstchen_core.checkpoints import read_part

    parts = {stage: replace(read_part(bundle, stage), trained=None) for stage in STAGES}  # no notices about sizes
    widths = {"prior": parts["prior"].params.c_cond, "decoder": parts["decoder"].params.clip_embd}

    def load(stage: str) -> Nodes:
        return Nodes(models.load_model(parts[stage]), stage, widths)

    by_stage = {stage: load(stage) for stage in STAGES}
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"tables kept": before == tables()}
    facts |= {"samplers": each_sampler(by_stage["decoder"]), "warnings": warnings(load)}
    for stage, nodes in by_stage.items():
        tensors |= {f"{stage}/{name}": x for name, x in runs(nodes, stage).items()}
    prior = by_stage["prior"]
    sampling = prior.patcher.get_model_object("model_sampling")
    for name, steps in (("dpmpp_2m", 1001), *((name, MANY) for name in LONG)):
        prior.inputs.clear()
        sigmas = ends(comfy.samplers.calculate_sigmas(sampling, "simple", steps))
        tensors[f"{steps} steps/{name}"] = prior.custom(comfy.samplers.sampler_object(name), sigmas)
    tensors["long times"] = prior.times()
    times, facts["schedules"] = schedules(sampling)
    other = first(ModelSamplingStableCascade().patch(prior.patcher, 2.0))
    try:
        Nodes(other, "prior", widths).custom(first(WuerstchenSampler.execute()), torch.tensor([1.0, 0.0]))
    except ValueError as error:
        facts["other schedule"] = str(error)
    return tensors | times, facts


if __name__ == "__main__":
    write_results(main)

"""Run by a ComfyUI's own Python, `inside_samplers.py COMFYUI BUNDLE OUTPUT`: what the host's own sampling nodes make of
both stages, for test_host_samplers.py to compare with the core."""

from __future__ import annotations

import logging
from collections.abc import Callable
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


def first(result: Any) -> Any:
    """A node's first output, in either host's form."""
    return getattr(result, "result", result)[0]


def conditions(stage: str, widths: dict[str, int]) -> tuple[Any, Any]:
    """Positive and negative of a stage; Stage B's picture is in both."""
    options = {"stable_cascade_prior": seeded(2, 16, 2, 2)} if stage == "decoder" else {}
    text, nothing = seeded(2, 77, widths[stage]), seeded(2, 77, widths[stage]).roll(1, -1)
    return [[text, options]], [[nothing, options]]


class Host:
    """The host's sampling nodes around one stage's model, with all that reaches its network."""

    def __init__(self, patcher: Any, stage: str, widths: dict[str, int]):
        self.patcher, self.cfg = patcher, CFG[stage]
        self.positive, self.negative = conditions(stage, widths)
        self.latent = {"samples": torch.zeros(SHAPES[stage])}
        self.inputs: list[tuple[Tensor, Tensor]] = []
        patcher.model.diffusion_model.register_forward_pre_hook(self._note)

    def _note(self, _: Any, given: tuple[Tensor, ...]) -> None:
        self.inputs.append((given[0][:2].clone(), given[1][0].clone()))

    def times(self) -> Tensor:
        """The times of all calls since the last time that this was asked."""
        times = torch.stack([t for _, t in self.inputs])
        self.inputs.clear()
        return times

    def custom(self, sampler: Any, sigmas: Tensor, seed: int = SEED) -> Tensor:
        from comfy_extras.nodes_custom_sampler import SamplerCustom

        given = (self.patcher, True, seed, self.cfg, self.positive, self.negative, sampler, sigmas, self.latent)
        return first(SamplerCustom().sample(*given))["samples"]

    def advanced(self, sampler: Any, sigmas: Tensor, guided: bool = True) -> Tensor:
        from comfy_extras import nodes_custom_sampler as host

        guider = (
            host.CFGGuider().get_guider(self.patcher, self.positive, self.negative, self.cfg)
            if guided
            else host.BasicGuider().get_guider(self.patcher, self.positive)
        )
        noise = first(host.RandomNoise().get_noise(SEED))
        return first(host.SamplerCustomAdvanced().sample(noise, first(guider), sampler, sigmas, self.latent))["samples"]

    def split(self, sampler: Any, sigmas: Tensor) -> Tensor:
        """In two runs; the second starts from what the first left of its noise."""
        from comfy_extras import nodes_custom_sampler as host

        halves = host.SplitSigmas().get_sigmas(sigmas, HALF)
        early, late = getattr(halves, "result", halves)
        left = {"samples": self.custom(sampler, early)}
        common = (self.cfg, self.positive, self.negative, sampler, late, left)
        return first(host.SamplerCustom().sample(self.patcher, False, SPLIT_SEED, *common))["samples"]

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


def runs(host: Host, stage: str) -> dict[str, Tensor]:
    """One stage through each of the host's nodes."""
    import comfy.sample
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import BasicScheduler, KSamplerSelect
    from pack.nodes.sampling import WuerstchenSampler, WuerstchenScheduler
    from pack.wuerstchen_core.diffusion.samplers import seeded_noise

    sigmas = first(WuerstchenScheduler.execute(host.patcher, "linear", STEPS))
    ours = first(WuerstchenSampler.execute())
    multistep = first(WuerstchenSampler.execute("dpmpp_2m"))
    basic = first(BasicScheduler().get_sigmas(host.patcher, "simple", STEPS, 1.0))
    draw = seeded_noise(SEED + 1, 2)
    same_noise = {"noise_sampler": lambda sigma, following: draw(host.latent["samples"])}
    results = {
        "noise": comfy.sample.prepare_noise(host.latent["samples"], SEED),
        "custom": host.custom(ours, sigmas),
        "basic schedule": host.custom(ours, basic),
        "advanced": host.advanced(ours, sigmas),
        "unguided": host.advanced(ours, sigmas, guided=False),
        "split": host.split(ours, sigmas),
        "ddpm": host.custom(comfy.samplers.ksampler("ddpm", same_noise), basic),
        "selected ddpm": host.custom(first(KSamplerSelect().get_sampler("ddpm")), basic),
        "whole": host.ksampler("euler", "simple", STEPS),
        "halves": host.halves("euler", "simple"),
        "one step": host.custom(ours, first(WuerstchenScheduler.execute(host.patcher, "linear", 1))),
        "fast": host.custom(
            first(WuerstchenSampler.execute("ddim")), first(WuerstchenScheduler.execute(host.patcher, "fast", STEPS))
        ),
        "multistep": host.custom(multistep, sigmas),
        "multistep again": host.custom(multistep, sigmas),  # the same SAMPLER: nothing may be left of the first run
        "still": host.custom(ours, basic.repeat_interleave(2)),
        "large seed": host.custom(ours, basic, 2**64 - 1),
    }
    host.inputs.clear()
    host.ksampler("ddpm", "simple", 20)
    results["times"] = host.times()
    results["latent"] = seeded(*SHAPES[stage])
    host.ksampler("euler", "simple", 5, {"samples": results["latent"]}, denoise=0.5)
    results["denoise input"], results["denoise times"] = host.inputs[0][0], host.times()
    return results


def schedules(sampling: Any) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The noise levels of the host's schedulers, as times where they are `simple`, and facts of all of them."""
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


def advised(load: Callable[[str], Host]) -> list[list[str]]:
    """What the log says in each of several runs of Stage B."""
    from comfy.samplers import sampler_object
    from pack.nodes.sampling import WuerstchenSampler

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pack.nodes.host.sampler_warnings").addHandler(handler)

    def lines(host: Host, sampler: Any, *levels: float) -> list[str]:
        said.clear()
        host.custom(sampler, torch.tensor([*levels, 0.0]))
        return [*said]

    host = load("decoder")
    clone = load("decoder")
    clone.patcher = host.patcher.clone()
    euler, ddpm = sampler_object("euler"), sampler_object("ddpm")
    return [
        lines(host, ddpm, 100.0, 1.0),
        lines(host, first(WuerstchenSampler.execute()), 100.0, 1.0),
        lines(host, euler, 100.0, 1.0),
        lines(host, euler, 100.0, 1.0),
        lines(clone, euler, 100.0, 1.0),
        lines(load("decoder"), euler, 100.0, 1.0),
        lines(load("prior"), euler, 100.0, 1.0),
        lines(load("prior"), euler, float("nan")),
        lines(load("prior"), ddpm, 100.0, 18.0),
    ]


def each_sampler(host: Host) -> dict[str, dict[str, bool]]:
    """Of every sampler: is its picture finite, does its seed change more than the first noise, and is it advised
    against."""
    import comfy.sample
    import comfy.samplers
    from pack.nodes.host.sampler_warnings import NO_NEW_NOISE, remark

    sigmas = comfy.samplers.calculate_sigmas(host.patcher.get_model_object("model_sampling"), "simple", 3)
    noise, facts = seeded(*host.latent["samples"].shape), {}
    for name in comfy.samplers.KSampler.SAMPLERS:
        sampler = comfy.samplers.sampler_object(name)
        common = (1.0, sampler, sigmas, host.positive, host.negative, host.latent["samples"])
        a, b = (comfy.sample.sample_custom(host.patcher, noise.clone(), *common, seed=seed) for seed in (1, 2))
        facts[name] = {"finite": bool(a.isfinite().all()), "random": not torch.equal(a, b)}
        facts[name]["advised"] = remark(sampler, sigmas, ancestral=True) == NO_NEW_NOISE
    return facts


def main(bundle: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import comfy.k_diffusion.sampling
    import comfy.samplers
    from comfy_extras.nodes_model_advanced import ModelSamplingStableCascade

    def tables() -> tuple[list[str], ...]:
        host = comfy.samplers
        return [*host.KSampler.SAMPLERS], [*host.KSampler.SCHEDULERS], dir(host), dir(comfy.k_diffusion.sampling)

    before = tables()
    load_pack()
    from pack.nodes.host import models
    from pack.nodes.sampling import WuerstchenSampler
    from pack.wuerstchen_core.checkpoints import read_part

    parts = {stage: read_part(bundle, stage) for stage in STAGES}
    widths = {"prior": parts["prior"].params.c_cond, "decoder": parts["decoder"].params.clip_embd}

    def load(stage: str) -> Host:
        return Host(models.load_model(parts[stage]), stage, widths)

    hosts = {stage: load(stage) for stage in STAGES}
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"tables kept": before == tables()}
    facts |= {"samplers": each_sampler(hosts["decoder"]), "advised": advised(load)}
    for stage, host in hosts.items():
        tensors |= {f"{stage}/{name}": x for name, x in runs(host, stage).items()}
    for name in LONG:
        hosts["prior"].inputs.clear()
        tensors[f"long/{name}"] = hosts["prior"].ksampler(name, "simple", 200)
    tensors["long times"] = hosts["prior"].times()
    tensors["long/longest"] = hosts["prior"].ksampler("dpmpp_2m", "simple", 1001)
    levels, facts["schedules"] = schedules(hosts["prior"].patcher.get_model_object("model_sampling"))
    other = first(ModelSamplingStableCascade().patch(hosts["prior"].patcher, 2.0))
    try:
        Host(other, "prior", widths).custom(first(WuerstchenSampler.execute()), torch.tensor([1.0, 0.0]))
    except ValueError as error:
        facts["other times"] = str(error)
    return tensors | levels, facts


if __name__ == "__main__":
    write_results(main)

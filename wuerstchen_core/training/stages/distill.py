"""Distils a prior or v2's Stage B into one that samples in few steps, as full weights or as adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common.dataclass_config import from_table, option
from ...diffusion.samplers import SAMPLERS, Denoiser, ddim_step, sample
from ...diffusion.schedule import decoder_times, linear_times, named_times
from ...inference.pipeline import WuerstchenPipeline
from ...inference.settings import SamplingSettings
from ...inference.stages import first_weight
from ...models.decoder import Decoder
from ...models.prior import Prior
from ..rng import StepRandom
from ..samples import SampleConfig
from ..stage import N
from .decoder import DecoderStage
from .diffusion import DiffusionStage
from .distill_config import DecoderAdapterConfig, DecoderDistillConfig, DistillConfig, PriorAdapterConfig
from .lora import AdapterStage, DecoderLoraStage, LoraStage
from .losses import resize_weights, squared_error
from .networks import encode_text, input_source, load_frozen, load_or_create
from .prior import PriorStage

METHOD = "steps of the teacher from the student's states"
START = option("", "initial weights of the student, in any format that `inspect` reads; default: the teacher's")


def distillation_losses(
    student: Denoiser,
    teacher: Denoiser,
    noise: Tensor,
    times: Tensor,
    teacher_steps: int,
    sampler: str,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """Returns the loss (scalar) of each of the student's steps along times [steps + 1], from noise [B, steps, c, h, w].

    The first of the noises is the start, the others are what DDPM adds after each step. `weights` [B, 1, h, w] are
    factors of the errors.
    """
    x, *drawn = noise.unbind(1)
    step, draws, losses = SAMPLERS[sampler](), iter(drawn), []
    for start, end in pairwise(times.to(x.device)):
        goal = end if sampler == "ddim" else times[-1].to(x.device)
        with torch.no_grad():
            path = linear_times(teacher_steps, float(start), float(goal))
            target = sample(teacher, x, path, draw=torch.zeros_like, sampler="ddim")
        t, t_next, t_goal = (one.expand(len(x)) for one in (start, end, goal))
        predicted = student(x, t)
        losses.append(squared_error(ddim_step(x, predicted, t, t_goal, torch.zeros_like), target, weights))
        if len(losses) < len(times) - 1:
            x = step(x, predicted.detach(), t, t_next, lambda _: next(draws))
    return losses


def without_adapters(net: nn.Module, paths: Iterable[str]) -> nn.Module:
    """Returns a network that shares the tensors of `net`, and has the adapted layers at `paths` without adapters."""
    base = copy.deepcopy(net, {id(x): x for x in (*net.parameters(), *net.buffers())})
    for path in paths:
        layer: Any = base.get_submodule(path)
        base.set_submodule(path, layer.get_base_layer())
    return base.eval()


class Distillation(DiffusionStage[N]):
    """Trains a student of the network that `[inputs]` names, from whose weights its training starts."""

    teacher: N
    sampler: str  # of the student
    fsdp_conflict = "[distill]"
    changes_sampling = True

    def __init__(self, config: Mapping[str, Any]):
        self.distill: Any = from_table(self.tables["distill"], config.get("distill", {}), "distill")
        super().__init__({**config, "noise": self.distill.corruption()})
        self.frozen = [*self.frozen, self.teacher]
        if self.distill.guidance > 1:
            self.empty = torch.stack(encode_text(self.text_encoder, self.dataset.tokenizer.uncounted([""])))

    def source(self, config: Mapping[str, Any]) -> str | Path:
        """Returns the source of the teacher."""
        return input_source(config, self.network)

    def facts(self) -> dict[str, Any]:
        about = {"method": METHOD, "teacher": Path(self.source(self.config)).name}
        return {
            "distillation": about | {key: getattr(self.distill, key) for key in ("steps", "teacher_steps", "guidance")}
        }

    def prepare(self, picked: Any, step: int, rng: StepRandom) -> tuple[Any, ...]:
        text, mask = self.text(picked, rng, self.noise.text_drop)
        conditioning, shape = self.conditioning(picked, rng), self.latents(picked).shape[1:]
        weights = resize_weights(self.dataset.loss_weights(picked), shape[-2:])
        return weights, rng.normal(self.distill.steps, *shape), *conditioning, text, mask

    def loss(self, net: N, *batch: Any) -> Tensor:
        weights, noise, *cond = batch

        def student(x: Tensor, t: Tensor) -> Tensor:
            return net(x, t, *cond).float()

        teacher, steps = self.guided_teacher(*cond), self.distill.teacher_steps
        losses = distillation_losses(student, teacher, noise, self.times(), steps, self.sampler, weights)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def guided_teacher(self, *cond: Any) -> Denoiser:
        """Returns the teacher, with guidance, for a batch's conditioning, text states and their mask."""
        *others, text, mask = cond
        states = self.read(text)
        if self.distill.guidance == 1:
            return lambda x, t: self.teacher(x, t, *others, states, mask).float()
        nothing = [torch.zeros_like(x) for x in others]
        empty = self.read(self.empty.to(text).expand(len(text), -1, -1))

        def predict(x: Tensor, t: Tensor) -> Tensor:
            uncond = self.teacher(x, t, *nothing, empty).float()
            return torch.lerp(uncond, self.teacher(x, t, *others, states, mask).float(), self.distill.guidance)

        return predict

    def read(self, text: Tensor) -> Any:
        """Returns what the teacher reads of text states in all its steps."""
        return text

    def times(self) -> Tensor:
        """Returns the times [steps + 1] of the student."""
        raise NotImplementedError

    def few_steps(self) -> dict[str, Any]:
        """Returns the settings of sampling with the student."""
        raise NotImplementedError

    def sampling(self) -> dict[str, Any]:
        return {**super().sampling(), **self.few_steps()}

    def start_pipeline(self, net: N) -> WuerstchenPipeline:
        return self.pipeline(self.teacher.to(first_weight(net).device))

    def compared(self, net: N, sampling: SamplingSettings) -> list[tuple[N, SamplingSettings]]:
        guidance = {f"{self.network}_guidance": self.distill.guidance}
        return [(self.teacher, sampling.updated(**guidance)), (net, sampling.updated(**guidance | self.few_steps()))]


class PriorDistillation(Distillation[Prior], PriorStage):
    """Trains a student of a prior."""

    sampler = "ddim"

    def read(self, text: Tensor) -> Any:
        return self.teacher.keys_values(text)

    def times(self) -> Tensor:
        return named_times("turbo", self.distill.steps)

    def few_steps(self) -> dict[str, Any]:
        built_in = {"prior_guidance": 1.0} if self.distill.guidance > 1 else {}
        return {"schedule": "turbo", "sampler": self.sampler, "prior_steps": self.distill.steps, **built_in}


class DecoderDistillation(Distillation[Decoder], DecoderStage):
    """Trains a student of v2's Stage B."""

    sampler = "ddpm"

    def times(self) -> Tensor:
        return decoder_times(self.distill.steps)

    def few_steps(self) -> dict[str, Any]:
        built_in = {"decoder_guidance": 1.0, "decoder_guidance_end": None} if self.distill.guidance > 1 else {}
        return {"decoder_steps": self.distill.steps, **built_in}


class FullWeights(Distillation[N]):
    """A student with weights of its own."""

    def build(self, config: Mapping[str, Any]) -> N:
        """Returns the student, with the weights of `start`, else the teacher's."""
        teacher = self.source(config)
        start = config.get("start") or teacher
        self.bases = list(dict.fromkeys([teacher, start]))
        self.teacher = load_frozen(config, self.network, nn.Module)  # type: ignore[assignment]
        net: N = load_or_create({**config, "start": start}, self.network, nn.Module)  # type: ignore[assignment]
        return net


class Adapters(Distillation[N], AdapterStage[N]):
    """A student that is the teacher with adapters."""

    def build(self, config: Mapping[str, Any]) -> N:
        """Returns the student, which shares its other weights with the teacher."""
        net = super().build(config)
        if self.adapters.text_targets:
            raise ValueError("[lora] text_targets is not for distillation, which trains no text encoder: remove it")
        self.teacher = without_adapters(net, self.layers)  # type: ignore[assignment]
        return net

    def sampling(self) -> dict[str, Any]:
        return self.few_steps()


class DistillStage(FullWeights[Prior], PriorDistillation):
    name = "distill"
    tables = {"start": START, "distill": DistillConfig, "sample": SampleConfig}


class DecoderDistillStage(FullWeights[Decoder], DecoderDistillation):
    name = "decoder-distill"
    tables = {"start": START, "distill": DecoderDistillConfig}


class DistillLoraStage(Adapters[Prior], PriorDistillation, LoraStage):
    name = "distill-lora"
    tables = {"distill": DistillConfig, "lora": PriorAdapterConfig, "sample": SampleConfig}


class DecoderDistillLoraStage(Adapters[Decoder], DecoderDistillation, DecoderLoraStage):
    name = "decoder-distill-lora"
    tables = {"distill": DecoderDistillConfig, "lora": DecoderAdapterConfig}

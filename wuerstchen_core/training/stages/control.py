"""Trains a ControlNet for a frozen Stage C, from hints that are made of the images or given beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ...checkpoints.build import load_control_net
from ...checkpoints.release import check_control, prior_values, release_of
from ...common.dataclass_config import Count, CountOrZero, Fraction, OneOf, Positive, from_table, option
from ...inference.control import Hint
from ...inference.pipeline import WuerstchenPipeline
from ...inference.settings import SamplingSettings
from ...models.control_net import KINDS, ControlNet, ControlNetParams
from ...models.prior import Prior, PriorParams
from ..data.caption_tokens import Tokens
from ..data.dataset import ImageDataset, IndexedDataset
from ..data.demo import MultiShapeDemoDataset
from ..data.hints import colour_blocks, contours, draw_boxes, outlines, silhouettes, widened
from ..rng import StepRandom
from .losses import NoiseConfig
from .networks import frozen_dtype, input_source, load_frozen
from .prior import PriorStage
from .text_tower import train_only

PART = "control_net"
MOST_BLOCKS = 8  # of a prior that get something, by default


@dataclass(frozen=True)
class ControlConfig:
    """The `[control]` table.

    Outlines are drawn with lines of random widths, and some of them without the edges within things, which suits
    drawings by hand.
    """

    hints: Annotated[str, OneOf(KINDS)] = option(meaning=f"what the ControlNet reads: {', '.join(KINDS)}")
    blocks: tuple[CountOrZero, ...] = option((), "blocks of the prior to add to, from 0; empty: 8, evenly spread")
    widths: tuple[Count, ...] = option(ControlNetParams.widths, "channels at 1/4, 1/8, 1/16 and 1/32 of the hint")
    repeats: tuple[Count, ...] = option(ControlNetParams.repeats, "convolutional blocks of each width")
    start: str = option("", "ControlNet to continue from, with the same sizes")
    drop: Fraction = option(0.05, "fraction of hints that are black")
    contours: Fraction = option(0.0, "fraction of outlines of things alone; for things on plain backgrounds")
    line_widths: tuple[Positive, Positive] = option(
        (1.0, 3.0), "least and largest width of an outline's lines, in 256ths of the shorter side"
    )

    def __post_init__(self) -> None:
        if self.line_widths[0] > self.line_widths[1]:
            raise ValueError(f"[control] line_widths are the least and the largest, got {list(self.line_widths)}")
        if self.hints != "outline" and (self.contours or self.line_widths != type(self).line_widths):
            raise ValueError('[control] contours and line_widths are for hints = "outline": remove them')


def control_params(config: ControlConfig, prior: PriorParams, values: tuple[float, ...] = ()) -> ControlNetParams:
    """Returns the params of a new ControlNet for a prior, with its `prior_values`."""
    return ControlNetParams(
        prior_width=prior.c,
        prior_depth=prior.depth,
        prior_release=release_of(prior) or "v2",
        prior_blocks=config.blocks or tuple(range(0, prior.depth, -(-prior.depth // MOST_BLOCKS))),
        hints=config.hints,
        widths=config.widths,
        repeats=config.repeats,
        prior_values=values,
    )


def start_control_net(config: ControlConfig, prior: Prior) -> ControlNet:
    """Returns the ControlNet to train for a prior: that of `start`, or a new one."""
    if not config.start:
        network = ControlNet(control_params(config, prior.params, prior_values(prior)))
        network.init_weights()
        return network
    network = load_control_net(config.start, dtype=torch.float32)
    check_control(network.params, prior.params, config.start)
    params = network.params
    if params.hints != config.hints:
        raise ValueError(f"[control] start: {config.start} reads hints of the kind {params.hints}: set that")
    for key, sizes in (("blocks", params.prior_blocks), ("widths", params.widths), ("repeats", params.repeats)):
        if getattr(config, key) not in (getattr(ControlConfig, key), sizes):
            raise ValueError(f"[control] start: {config.start} has {key} {list(sizes)}: set these, or remove {key}")
    network.params = replace(params, prior_values=prior_values(prior))
    return network.train()


class HintMaker:
    """Makes the hints of `[control]` of the images of a dataset, or reads those beside them."""

    def __init__(self, config: ControlConfig, dataset: ImageDataset):
        self.config = config
        dataset.read_images("hints", config.hints == "given")
        if config.hints == "boxes" and not dataset.has_boxes:
            raise ValueError(
                '[control] hints = "boxes" needs the places of things, which are known for the demo\'s drawings only: '
                "remove [data] source, or choose another kind of hints"
            )

    def __call__(self, dataset: ImageDataset, picked: Any, rng: StepRandom | None = None) -> Tensor:
        """Returns the hints [B, 3, H, W] of a batch; without `rng`, none is black and lines are of medium width.

        None of scattered scenes is black: a black hint should leave things at their usual places.
        """
        images, kind = dataset.images(picked), self.config.hints
        if kind == "given":
            hints = dataset.given_hints(picked)
        elif kind == "boxes":
            hints = draw_boxes(dataset.boxes(picked), (images.shape[-2], images.shape[-1]))
        elif kind == "outline":
            hints = self._outlines(images, rng)
        else:
            hints = silhouettes(images) if kind == "silhouette" else colour_blocks(images)
        hints = hints.expand(-1, 3, -1, -1)
        if rng is None or (isinstance(dataset, MultiShapeDemoDataset) and dataset.is_scattered(picked)):
            return hints
        return hints * (rng.uniform() >= self.config.drop)[:, None, None, None]

    def _outlines(self, images: Tensor, rng: StepRandom | None) -> Tensor:
        """Returns the outlines [B, 1, H, W] of images."""
        own, middle = self.config, torch.full((len(images),), 0.5)
        widths, kinds = (middle, middle) if rng is None else (rng.uniform(), rng.uniform())
        low, high = own.line_widths
        lines, alone = outlines(images), kinds < own.contours
        lines[alone] = contours(images[alone])
        return torch.cat(
            [widened(x, low + (high - low) * float(w)) for x, w in zip(lines.split(1), widths, strict=True)]
        )


class ControlledPrior(nn.Module):
    """A frozen prior, and the ControlNet that is trained for it."""

    def __init__(self, prior: Prior, control_net: ControlNet):
        super().__init__()
        self.prior, self.control_net = prior.requires_grad_(False), control_net.requires_grad_(True)

    @property
    def params(self) -> PriorParams:
        """Those of the prior."""
        return self.prior.params

    def forward(self, latents: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None, hint: Tensor) -> Tensor:
        """Returns what the prior returns, steered by hints [B, 3, H, W] in [0, 1]."""
        return self.prior(latents, t, text, text_mask, control=self.control_net(hint, latents.shape[-2:]))


class ControlStage(PriorStage):
    """A ControlNet; each image that is trained on has a hint."""

    name = "control"
    part = PART
    fsdp_conflict = "[control]"
    tables = {"noise": NoiseConfig, "control": ControlConfig}

    def __init__(self, config: Mapping[str, Any]):
        self.control = from_table(ControlConfig, config.get("control", {}), "control")
        super().__init__(config)
        self.hints = HintMaker(self.control, self.dataset)

    def build(self, config: Mapping[str, Any]) -> Any:
        """Returns the prior of `[inputs]` with a ControlNet, whose weights are the only trained ones."""
        if self.noise.slow_times:
            raise ValueError("[noise] slow_times is not for a ControlNet, which has no time mappers: remove it")
        if config.get("train", {}).get("muon_lr"):
            raise ValueError("[train] muon_lr is for the blocks of priors and decoders: remove it")
        prior = load_frozen(config, "prior", Prior)
        self.bases = [input_source(config, "prior"), *filter(None, [self.control.start])]
        if frozen_dtype(config) != torch.float32:
            self.fsdp_conflict = "[train] frozen"
        net = ControlledPrior(prior, start_control_net(self.control, prior))
        train_only(net)
        return net

    def sampling(self) -> dict[str, Any]:
        return {}  # those of the model that it steers

    def prepare(self, picked: Any, step: int, rng: StepRandom) -> tuple[Any, ...]:
        return *super().prepare(picked, step, rng), self.hints(self.dataset, picked, rng)

    def pipeline(self, net: Any) -> WuerstchenPipeline:
        return super().pipeline(net.prior)

    def sample_inputs(self, validation: IndexedDataset, picked: Tensor) -> list[Tensor]:
        return [self.hints(validation, picked)]

    def reconstruct(
        self, net: Any, images: Tensor, tokens: list[Tokens], sampling: SamplingSettings, *inputs: Tensor
    ) -> Tensor:
        """Generates images from the captions and the hints."""
        pipeline, (hints,) = self.pipeline(net), inputs
        prior_text, decoder_text = self.text_states(pipeline, tokens)
        features = pipeline.sample_prior(prior_text, sampling, control=Hint(net.control_net, hints))
        decoded: Tensor = pipeline.require("vqgan").decode(pipeline.sample_decoder(features, decoder_text, sampling))
        return decoded

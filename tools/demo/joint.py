"""Trains the demo's Stage C together with its ControlNets.

A frozen prior paints what it knows only where it knows it. So a share of the batches has scattered scenes, each batch
with hints for one of the ControlNets, of which prior and ControlNet learn together. The sizes of the ControlNets and
the kinds of their hints are those of the recipes that train them for a finished prior.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from wuerstchen_core.checkpoints import demo_path, save_bundle
from wuerstchen_core.checkpoints.release import prior_values
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.data.demo import MultiShapeDemoDataset
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.stages.control import PART, ControlConfig, HintMaker, start_control_net
from wuerstchen_core.training.stages.prior import PriorStage

OTHERS = 8  # one in so many batches without scattered scenes has black hints, which should change nothing
RECIPES = {"outline": "control.toml", "boxes": "control_boxes.toml"}  # of the ControlNets, by the kind of their hints


class SteeredPrior(nn.Module):
    """A prior and ControlNets for it, by the kind of their hints."""

    def __init__(self, prior: Prior, control_nets: Mapping[str, nn.Module]):
        super().__init__()
        self.prior, self.control_nets = prior, nn.ModuleDict(control_nets)

    @property
    def params(self) -> PriorParams:
        """Those of the prior."""
        return self.prior.params

    def forward(
        self, latents: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None, hint: Tensor | None, kind: str
    ) -> Tensor:
        """Returns what the prior returns, steered by hints [B, 3, H, W] in [0, 1] if there are any."""
        control = () if hint is None else self.control_nets[kind](hint, latents.shape[-2:])
        noise: Tensor = self.prior(latents, t, text, text_mask, control=control)
        return noise


class JointStage(PriorStage):
    """Stage C and its ControlNets, whose weights are written beside the prior's.

    `control_nets` are the files of those to train further, by the kind of their hints.
    """

    unused_weights = True  # of a ControlNet, in steps without its hints

    def __init__(self, config: Mapping[str, Any], control_nets: Mapping[str, str] = MappingProxyType({})):
        folder = demo_path().parent / "recipe"
        tables = {kind: read_config(folder / file, [])["control"] for kind, file in RECIPES.items()}
        self.kinds = {
            kind: from_table(ControlConfig, {**table, "start": control_nets.get(kind, "")}, "control")
            for kind, table in tables.items()
        }
        super().__init__(config)
        self.makers = [HintMaker(own, self.dataset) for own in self.kinds.values()]

    def build(self, config: Mapping[str, Any]) -> Any:
        prior = super().build(config)
        return SteeredPrior(prior, {kind: start_control_net(own, prior) for kind, own in self.kinds.items()})

    def prepare(self, picked: Any, step: int, rng: StepRandom) -> tuple[Any, ...]:
        batch = super().prepare(picked, step, rng)
        scattered = isinstance(self.dataset, MultiShapeDemoDataset) and self.dataset.is_scattered(picked)
        if not scattered and rng.shared(OTHERS):
            return *batch, None, ""
        maker = self.makers[rng.shared(len(self.makers))]
        hint = maker(self.dataset, picked, rng)
        return *batch, hint if scattered else torch.zeros_like(hint), maker.config.hints

    def pipeline(self, net: Any) -> WuerstchenPipeline:
        return super().pipeline(net.prior)

    def save(self, path: Path, net: Any, metadata: Mapping[str, Any]) -> None:
        super().save(path, net, metadata)
        own = {key: metadata[key] for key in ("training", "licence") if key in metadata}
        for kind, control_net in net.control_nets.items():
            control_net.params = replace(control_net.params, prior_values=prior_values(net.prior))
            save_bundle(path.with_name(f"{kind}.safetensors"), {PART: control_net}, own)

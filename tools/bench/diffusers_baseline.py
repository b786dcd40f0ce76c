"""diffusers' copy of Würstchen, driven as its own pipelines drive it.

It has no image encoder: torchvision's stands in, which its training script uses.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wuerstchen_core.checkpoints.diffusers_layout import CLASSES
from wuerstchen_core.common.devices import DTYPES
from wuerstchen_core.common.geometry import decoder_side, prior_side
from wuerstchen_core.diffusion.schedule import linear_times
from wuerstchen_core.models.image_encoder import EFFICIENTNET_V2_S, ImageEncoderParams, semantic_view

from .cases import PICTURE, STAGES, Case
from .diffusers_pipeline import Painter
from .inputs import DECODER_GUIDANCE, PRIOR_GUIDANCE, SEED, inputs, one_call
from .setting import Setting
from .weights import weight_file

PACKAGES = ("diffusers", "transformers", "accelerate")
REQUIREMENTS = "requirements-bench.txt"
PIPELINES = "diffusers.pipelines.deprecated.wuerstchen"


def check_installed() -> None:
    """Raise ValueError if the peer isn't there."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{missing[0]}, which the peer needs, is not installed: python -m pip install -r {REQUIREMENTS}, "
            "or measure ours alone with --no-peer"
        )


def import_packages() -> None:
    """Import what the peer needs, which is no part of its memory or of its loading, and keep its warnings back."""
    importlib.import_module("diffusers.utils.logging").set_verbosity_error()
    for part in CLASSES:
        network_class(part)
    scheduler()


def network_class(part: str) -> Any:
    """diffusers' class of a part."""
    return getattr(importlib.import_module(PIPELINES), CLASSES[part])


def scheduler() -> Any:
    """diffusers' scheduler of both stages."""
    return importlib.import_module("diffusers").DDPMWuerstchenScheduler()


def image_encoder(params: ImageEncoderParams) -> nn.Module:
    """torchvision's EfficientNet and the 1x1 mapper, as the original and diffusers' training script build it."""
    from torchvision.models import efficientnet_v2_s

    if params.stages != EFFICIENTNET_V2_S:
        raise ValueError("torchvision builds this image encoder at its full size alone: measure ours with --no-peer")
    network = nn.Sequential()
    network.backbone = efficientnet_v2_s().features
    network.mapper = nn.Sequential(
        nn.Conv2d(params.last_channel, params.c_latent, kernel_size=1, bias=False), nn.BatchNorm2d(params.c_latent)
    )
    return network


class Peer:
    """The peer's networks of a stage, and its work."""

    left_out = 0.0

    def __init__(self, setting: Setting):
        self.setting, self.dtype = setting, setting.compute or DTYPES[setting.dtype]
        self.networks: dict[str, Any] = {part: self._load(part) for part in STAGES[setting.stage].parts}
        self.painter = Painter(self.networks, scheduler, setting) if setting.stage == PICTURE else None

    def _load(self, part: str) -> nn.Module:
        """A network as the peer's users load it."""
        path, network = weight_file(self.setting.folder, part, self.setting.dtype), None
        if part == "image_encoder":
            network = image_encoder(self.setting.sizes.image_encoder)
            network.load_state_dict(load_file(path))
            network.to(self.dtype)
        else:
            network = network_class(part).from_pretrained(path.parent, torch_dtype=self.dtype)
        return network.to(self.setting.device).eval().requires_grad_(False)

    def compile(self) -> None:
        """Let torch compile the networks, when they are first called."""
        for part, network in self.networks.items():
            if part == "vqgan":
                for name in ("encode", "decode"):
                    setattr(network, name, torch.compile(getattr(network, name)))
            else:
                network.compile()

    def output(self, case: Case) -> Tensor:
        """As ours."""
        if not STAGES[case.stage].steps:
            return self._call(case)()
        return self._network(case)(*one_call(case, self.setting.sizes, self.setting.device, self.dtype))

    def run(self, case: Case, rounds: int, after: Callable[[], None]) -> None:
        """As ours."""
        for _ in self.rounds(case, rounds):
            after()

    def rounds(self, case: Case, rounds: int) -> Iterator[None]:
        """Do the work once between two of what it yields."""
        if STAGES[case.stage].steps:
            yield from self._steps(case, rounds)
            return
        call = self._call(case)
        for _ in range(rounds):
            call()
            yield

    def _network(self, case: Case) -> Any:
        return self.networks[STAGES[case.stage].parts[0]]

    def _steps(self, case: Case, steps: int) -> Iterator[None]:
        """The loop of diffusers' two pipelines."""
        network, device, sizes = self._network(case), self.setting.device, self.setting.sizes
        cond, scale = self._conditioning(case)
        prior = case.stage == "prior"
        side = (prior_side if prior else decoder_side)(case.side)
        schedule = scheduler()
        schedule.set_timesteps(timesteps=linear_times(steps), device=device)
        generators = [torch.Generator().manual_seed(SEED + i) for i in range(case.batch)]
        shape = (sizes.prior.c_in if prior else sizes.decoder.c_in, side, side)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        latents = noise.to(device, self.dtype)
        for t in schedule.timesteps[:-1]:
            ratio = t.expand(len(latents)).to(self.dtype)
            if scale > 1:
                both = network(torch.cat([latents] * 2), torch.cat([ratio] * 2), *cond)
                wanted, unwanted = both.chunk(2)
                noise = torch.lerp(unwanted, wanted, scale)
            else:
                noise = network(latents, ratio, *cond)
            told = {"model_output": noise, "timestep": ratio, "sample": latents, "generator": generators}
            latents = schedule.step(**told).prev_sample
            yield

    def _conditioning(self, case: Case) -> tuple[tuple[Tensor, ...], float]:
        """What the network is given beside x and t, and the scale of the guidance (0: none)."""
        given = inputs(case, self.setting.sizes, self.setting.device, self.dtype)
        if case.stage == "prior":
            negative = given["prior_negative"].expand(case.batch, -1, -1)
            return (torch.cat([given["prior_text"], negative]),), PRIOR_GUIDANCE
        features, text = given["features"], given["text"]
        if STAGES[case.stage].copies == 1:
            return (features, text), 0.0
        negative = given["negative"].expand(case.batch, -1, -1)
        return (torch.cat([features, torch.zeros_like(features)]), torch.cat([text, negative])), DECODER_GUIDANCE

    def _call(self, case: Case) -> Callable[[], Tensor]:
        """The work of a stage that is not measured by steps."""
        given = inputs(case, self.setting.sizes, self.setting.device, self.dtype)
        if self.painter is not None:
            return partial(self._paint, self.painter, case, given)
        network = self._network(case)
        if case.stage == "image-encoder":
            return lambda: network.mapper(network.backbone(semantic_view(given["images"].float()).to(self.dtype)))
        if case.stage == "vqgan-encode":
            return lambda: network.encode(given["images"]).latents
        return lambda: network.decode(given["latents"]).sample

    def _paint(self, painter: Painter, case: Case, given: dict[str, Tensor]) -> Tensor:
        pictures, self.left_out = painter.paint(case, given)
        return pictures

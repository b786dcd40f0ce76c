"""diffusers' copy of Würstchen, driven as its own pipelines drive it.

It has no image encoder: torchvision's stands in, which its training script uses.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..devices import DTYPES
from ..diffusion.schedule import linear_times
from ..diffusion.sizes import decoder_side, prior_side
from ..models.image_encoder import EFFICIENTNET_V2_S, ImageEncoderParams, semantic_view
from .cases import STAGES, Case
from .inputs import DECODER_GUIDANCE, PRIOR_GUIDANCE, SEED, inputs, one_call
from .weights import CLASSES, Sizes, weight_file

PACKAGES = ("diffusers", "transformers", "accelerate")
REQUIREMENTS = "requirements-bench.txt"


def check_installed() -> None:
    """Raise ValueError if the peer isn't there."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{missing[0]}, which the peer needs, is not installed: python -m pip install -r {REQUIREMENTS}, "
            "or measure ours alone with --no-peer"
        )


def import_packages() -> None:
    """Import what the peer needs, which is no part of its memory or of its loading."""
    for part in CLASSES:
        network_class(part)
    importlib.import_module("diffusers").DDPMWuerstchenScheduler()


def network_class(part: str) -> Any:
    """diffusers' class of a part."""
    from diffusers.pipelines.deprecated import wuerstchen

    return getattr(wuerstchen, CLASSES[part])


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


def load(part: str, path: Path, dtype: torch.dtype, device: Any, sizes: Sizes) -> nn.Module:
    """A part as the peer's users load it."""
    network: nn.Module
    if part == "image_encoder":
        network = image_encoder(sizes.image_encoder)
        network.load_state_dict(load_file(path))
        network.to(dtype)
    else:
        network = network_class(part).from_pretrained(path.parent, torch_dtype=dtype)
    return network.to(device).eval().requires_grad_(False)


class Peer:
    """The peer's networks of a stage, and its work."""

    def __init__(self, stage: str, folder: Path, sizes: Sizes, dtype: str, device: Any):
        self.sizes, self.device, self.dtype = sizes, device, DTYPES[dtype]
        parts = [part for part in STAGES[stage].parts if part != "vqgan" or not stage.startswith("decoder")]
        self.networks: dict[str, Any] = {
            part: load(part, weight_file(folder, part, dtype), self.dtype, device, sizes) for part in parts
        }

    def compile(self) -> None:
        """Let torch compile the networks, when they are first called."""
        for part, network in self.networks.items():
            if part == "vqgan":
                for name in ("encode", "decode"):
                    setattr(network, name, torch.compile(getattr(network, name)))
            else:
                network.compile()

    def output(self, case: Case) -> Tensor:
        """What one call of the network gives."""
        if STAGES[case.stage].steps:
            x, t, *rest = one_call(case, self.sizes, self.device, self.dtype)
            return self.networks[STAGES[case.stage].parts[0]](x, t, *rest)
        return self._call(case)()

    def rounds(self, case: Case, rounds: int) -> Iterator[None]:
        """Do the work once between two of what it yields."""
        if not STAGES[case.stage].steps:
            call = self._call(case)
            for _ in range(rounds):
                call()
                yield
            return
        given = inputs(case, self.sizes, self.device, self.dtype)
        if case.stage == "prior":
            negative = given["prior_negative"].expand(case.batch, -1, -1)
            cond: tuple[Tensor, ...] = (torch.cat([given["prior_text"], negative]),)
            shape = (self.sizes.prior.c_in, prior_side(case.side), prior_side(case.side))
            scale = PRIOR_GUIDANCE
        else:
            features, text = given["features"], given["text"]
            cond, scale = (features, text), 0.0
            if STAGES[case.stage].copies == 2:
                negative = given["negative"].expand(case.batch, -1, -1)
                cond = (torch.cat([features, torch.zeros_like(features)]), torch.cat([text, negative]))
                scale = DECODER_GUIDANCE
            shape = (self.sizes.decoder.c_in, decoder_side(case.side), decoder_side(case.side))
        yield from self._steps(self.networks[STAGES[case.stage].parts[0]], case, shape, cond, scale, rounds)

    def _steps(
        self, network: Any, case: Case, shape: tuple[int, ...], cond: tuple[Tensor, ...], scale: float, steps: int
    ) -> Iterator[None]:
        """The loop of diffusers' two pipelines."""
        scheduler = importlib.import_module("diffusers").DDPMWuerstchenScheduler()
        scheduler.set_timesteps(timesteps=linear_times(steps), device=self.device)
        generators = [torch.Generator().manual_seed(SEED + i) for i in range(case.batch)]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        latents = noise.to(self.device, self.dtype) * scheduler.init_noise_sigma
        for t in scheduler.timesteps[:-1]:
            ratio = t.expand(len(latents)).to(self.dtype)
            if scale > 1:
                both = network(torch.cat([latents] * 2), torch.cat([ratio] * 2), *cond)
                wanted, unwanted = both.chunk(2)
                noise = torch.lerp(unwanted, wanted, scale)
            else:
                noise = network(latents, ratio, *cond)
            latents = scheduler.step(
                model_output=noise, timestep=ratio, sample=latents, generator=generators
            ).prev_sample
            yield

    def run(self, case: Case, rounds: int, after: Callable[[], None]) -> None:
        """As ours."""
        for _ in self.rounds(case, rounds):
            after()

    def _call(self, case: Case) -> Callable[[], Tensor]:
        """The work of a stage that has no steps."""
        given = inputs(case, self.sizes, self.device, self.dtype)
        [network] = self.networks.values()
        if case.stage == "image-encoder":
            return lambda: network.mapper(network.backbone(semantic_view(given["images"].float()).to(self.dtype)))
        if case.stage == "vqgan-encode":
            return lambda: network.encode(given["images"]).latents
        return lambda: network.decode(given["latents"]).sample

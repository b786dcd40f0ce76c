"""A tiny version of every network, with inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wuerstchen_core.models.control_net import ControlNet, ControlNetParams
from wuerstchen_core.models.decoder import Decoder, DecoderParams
from wuerstchen_core.models.image_encoder import FUSED, MB, ImageEncoder, ImageEncoderParams
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams, tokenize
from wuerstchen_core.models.token_decoder import TokenDecoder, TokenDecoderParams
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams

PRIOR = PriorParams(c=64, c_cond=32, depth=2, nhead=1)
CONTROL = ControlNetParams(
    prior_width=64, prior_depth=2, prior_blocks=(0, 1), hints="outline", widths=(8, 16, 16, 24), repeats=(1, 1, 1, 1)
)
DECODER = DecoderParams(
    c_cond=32,
    c_hidden=(32, 64, 64),
    nhead=(-1, 1, 1),
    blocks=(1, 2, 2),
    level_config=("CT", "CTA", "CTFA"),
    inject_effnet=(False, True, True),
    clip_embd=24,
)
TOKEN_DECODER = TokenDecoderParams(
    c_in=16,
    c_out=16,
    num_labels=64,
    c_cond=32,
    c_hidden=(32, 64, 64),
    nhead=(-1, 16, 16),
    blocks=(1, 2, 2),
    level_config=("CT", "CTA", "CTFA"),
    byt5_embd=24,
)
VQ = VQGANParams(bottleneck_blocks=2, c_hidden=32, codebook_size=64)
IMAGE = ImageEncoderParams(
    stages=((FUSED, 1, 3, 2, 8, 8, 1), (FUSED, 4, 3, 2, 8, 16, 2), (MB, 4, 3, 2, 16, 24, 2), (MB, 4, 3, 2, 24, 32, 1)),
    last_channel=64,
)
TEXT = TextEncoderParams(width=32, heads=2, layers=2)
PROMPTS = ("a red apple on a blue background", "a cat", "")


@dataclass(frozen=True)
class Network:
    """Functions that build and call a network; `inputs` returns its arguments for 3 samples."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    shape: tuple[int, ...]  # of the output
    call: Callable[..., Tensor] = lambda network, *inputs: network(*inputs)  # noqa: E731

    def perturbed(self) -> nn.Module:
        """Returns the network in eval mode, with its initial weights plus noise, so that none are zero."""
        torch.manual_seed(0)
        network = self.build()
        network.init_weights()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return network.eval()


def _random(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


TIMES = torch.tensor([1.0, 0.5, 0.01])


def _prior_inputs() -> tuple[Tensor, ...]:
    latents, text = _random((3, 16, 5, 7), (3, 9, PRIOR.c_cond))
    return latents, TIMES, text


def _decoder_inputs() -> tuple[Tensor, ...]:
    latents, prior_latents, text = _random((3, 4, 16, 24), (3, 16, 2, 3), (3, 7, DECODER.clip_embd))
    return latents, TIMES, prior_latents, text


def _token_decoder_inputs() -> tuple[Tensor, ...]:
    prior_latents, text = _random((3, 16, 2, 3), (3, 7, TOKEN_DECODER.byt5_embd))
    tokens = torch.randint(TOKEN_DECODER.num_labels, (3, 16, 24), generator=torch.Generator().manual_seed(2))
    return tokens, TIMES, prior_latents, text


def _autoencode(network: VQGAN, images: Tensor) -> Tensor:
    return network.decode(network.encode(images))


def _control(network: ControlNet, hints: Tensor) -> Tensor:
    return torch.cat([x for x in network(hints, (2, 3)) if x is not None], dim=1).contiguous()


NETWORKS = {
    "prior": Network(lambda: Prior(PRIOR), _prior_inputs, (3, 16, 5, 7)),
    "decoder": Network(lambda: Decoder(DECODER), _decoder_inputs, (3, 4, 16, 24)),
    "token_decoder": Network(lambda: TokenDecoder(TOKEN_DECODER), _token_decoder_inputs, (3, 64, 16, 24)),
    "vqgan": Network(lambda: VQGAN(VQ), lambda: _random((3, 3, 16, 24)), (3, 3, 16, 24), _autoencode),
    "image_encoder": Network(lambda: ImageEncoder(IMAGE), lambda: _random((3, 3, 64, 96)), (3, 16, 2, 3)),
    "control_net": Network(lambda: ControlNet(CONTROL), lambda: _random((3, 3, 128, 96)), (3, 128, 2, 3), _control),
    "text_encoder": Network(lambda: TextEncoder(TEXT), lambda: tokenize(PROMPTS), (3, 77, 32)),
}

"""A complete tiny model with random weights, for tests of the pipeline and the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.networks import DECODER, IMAGE, PRIOR, TEXT, TOKEN_DECODER, VQ
from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.models.decoder import Decoder
from wuerstchen_core.models.image_encoder import ImageEncoder
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.models.text_encoder import TextEncoder
from wuerstchen_core.models.token_decoder import TokenDecoder
from wuerstchen_core.models.vqgan import VQGAN

METADATA = {
    "sampling": {
        "prior_steps": 3, "prior_guidance": 2.0, "decoder_steps": 2, "width": 128, "height": 64,
    },
    "vocabulary": {
        "words": ["a", "apple", "blue", "on", "red", "small"], "things": ["red apple"], "colours": ["blue"],
        "sizes": ["large", "small"],
    },
    "licence": "MIT",
}  # fmt: skip


def tiny_parts(release: str = "v2") -> dict[str, nn.Module]:
    """Returns the six networks of a release with noisy initial weights; one text encoder serves both stages."""
    torch.manual_seed(0)
    tower = TextEncoder(TEXT)
    decoders: dict[str, tuple[str, nn.Module]] = {
        "v1": ("token_decoder", TokenDecoder(replace(TOKEN_DECODER, byt5_embd=TEXT.width))),
        "v2": ("decoder", Decoder(replace(DECODER, clip_embd=TEXT.width))),
    }
    name, decoder = decoders[release]
    units = {} if release == "v2" else {"feature_scale": 1.0, "feature_shift": 0.0}
    parts = {
        "prior": Prior(replace(PRIOR, **units)),
        name: decoder,
        "vqgan": VQGAN(VQ),
        "image_encoder": ImageEncoder(IMAGE),
        "prior_text_encoder": tower,
        "decoder_text_encoder": tower,
    }
    for name, network in parts.items():
        if name != "image_encoder":
            network.init_weights()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    colours = parts["vqgan"].out_block[0]  # grey pictures, so that few pixels are clipped at 0 and 255
    with torch.no_grad():
        colours.weight.mul_(0.05)
        colours.bias.fill_(0.5)
    return parts


def write_tiny_bundle(
    path: Path, metadata: dict[str, Any] = METADATA, without: tuple[str, ...] = (), release: str = "v2"
) -> Path:
    """Writes the tiny model as a bundle in fp32, except the parts named in `without`."""
    save_bundle(path, {name: part for name, part in tiny_parts(release).items() if name not in without}, metadata)
    return path

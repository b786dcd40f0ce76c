"""What later stages need of earlier ones: frozen networks, and latents computed once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoints import build_part, read_part
from ..checkpoints.read import SHIPPED
from ..models.image_encoder import ImageEncoder, semantic_view
from ..models.text_encoder import TextEncoder, tokenize
from ..models.vqgan import VQGAN

N = TypeVar("N", bound=nn.Module)


def source_of(config: Mapping[str, Any], stage: str) -> str | Path:
    """Where a stage's network is: where `[inputs]` says, or where the same run puts it."""
    return config.get("inputs", {}).get(stage, Path(config["run"]) / stage / f"{stage}.safetensors")


def is_there(source: str | Path) -> bool:
    """Whether it is a shipped model's name, or a file or folder."""
    return source in SHIPPED or Path(source).exists()


def frozen(config: Mapping[str, Any], stage: str, part: str, kind: type[N]) -> N:
    """A network that an earlier stage of the same run trained, or that `[inputs]` names a source of."""
    source = source_of(config, stage)
    if not is_there(source):
        raise ValueError(f"{source} is missing: train the {stage} first, or name its file as {stage} under [inputs]")
    network = build_part(read_part(source, part), dtype=torch.float32)
    assert isinstance(network, kind)
    return network


@torch.no_grad()
def features_of(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """Stage C features [B, 16, h, w] of pictures [B, 3, H, W] in [0, 1]."""
    return encoder(semantic_view(images.to(_place(encoder)))).cpu()


@torch.no_grad()
def latents_of(vqgan: VQGAN, images: Tensor) -> Tensor:
    """Stage A latents [B, 4, H / 4, W / 4] of pictures, as Stage B works on them (unit variance)."""
    return vqgan.encode(images.to(_place(vqgan))).cpu() / vqgan.params.scale_factor


@torch.no_grad()
def tokens_of(vqgan: VQGAN, images: Tensor) -> Tensor:
    """Stage A tokens [B, H / 4, W / 4] of pictures."""
    return vqgan.quantize(vqgan.encode(images.to(_place(vqgan)))).indices.cpu()


@torch.no_grad()
def text_states(tower: TextEncoder, prompts: list[str]) -> Tensor:
    """Text states [B, 77, c]."""
    return tower(*(x.to(_place(tower)) for x in tokenize(prompts))).cpu()


def _place(network: nn.Module) -> torch.device:
    return next(network.parameters()).device

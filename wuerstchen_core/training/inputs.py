"""What later stages need of earlier ones: frozen networks, and latents computed once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoints import build_part, read_part
from ..models.image_encoder import ImageEncoder, semantic_view
from ..models.text_encoder import TextEncoder, tokenize
from ..models.vqgan import VQGAN
from .pictures import DemoPictures

N = TypeVar("N", bound=nn.Module)


def frozen(config: Mapping[str, Any], stage: str, part: str, kind: type[N]) -> N:
    """A network that an earlier stage of the same run trained, or that `[inputs]` names a file for."""
    own = Path(config["run"]) / stage / f"{stage}.safetensors"
    source = Path(config.get("inputs", {}).get(stage, own))
    if not source.exists():
        raise ValueError(f"{source} is missing: train the {stage} first, or name its file as {stage} under [inputs]")
    network = build_part(read_part(source, part), dtype=torch.float32)
    assert isinstance(network, kind)
    return network


@torch.no_grad()
def features_of(encoder: ImageEncoder, pictures: DemoPictures) -> Tensor:
    """Stage C features [N, 16, h, w] of all pictures."""
    return torch.cat([encoder(semantic_view(pictures.view(part))) for part in _parts(pictures)])


@torch.no_grad()
def latents_of(vqgan: VQGAN, pictures: DemoPictures) -> Tensor:
    """Stage A latents [N, 4, H, W] of all pictures, as Stage B works on them (unit variance)."""
    encoded = [vqgan.encode(pictures.view(part)) for part in _parts(pictures)]
    return torch.cat(encoded) / vqgan.params.scale_factor


@torch.no_grad()
def tokens_of(vqgan: VQGAN, pictures: DemoPictures) -> Tensor:
    """Stage A tokens [N, H, W] of all pictures."""
    return torch.cat([vqgan.quantize(vqgan.encode(pictures.view(part))).indices for part in _parts(pictures)])


@torch.no_grad()
def text_states(tower: TextEncoder, prompts: list[str]) -> Tensor:
    """Text states [B, 77, c]."""
    return tower(*tokenize(prompts))


def _parts(pictures: DemoPictures, size: int = 32) -> list[slice]:
    return [slice(start, start + size) for start in range(0, len(pictures), size)]

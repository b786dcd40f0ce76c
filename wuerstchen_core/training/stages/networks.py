"""What later stages need of earlier ones: frozen networks, and latents computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...checkpoints import Part, build_part, read_part
from ...checkpoints.open import SHIPPED, open_source
from ...checkpoints.source import merge_licences
from ...common.dataclass_config import from_table
from ...models.image_encoder import ImageEncoder, semantic_view
from ...models.text_encoder import TextEncoder, tokenize
from ...models.vqgan import VQGAN

N = TypeVar("N", bound=nn.Module)

COMPUTED_BY = {  # what may be computed before a training: by the network of which stage, which part of a bundle it is
    "latents": ("vqgan", "vqgan"),
    "features": ("encoder", "image_encoder"),
    "text": ("text", "prior_text_encoder"),
}


def input_source(config: Mapping[str, Any], stage: str) -> str | Path:
    """Where a stage's network is: where `[inputs]` says, or where the same run puts it."""
    return config.get("inputs", {}).get(stage, Path(config["run"]) / stage / f"{stage}.safetensors")


def source_exists(source: str | Path) -> bool:
    """Whether it is a shipped model's name, or a file or folder."""
    return source in SHIPPED or Path(source).exists()


def load_or_create(config: Mapping[str, Any], part: str, kind: type[N], sizes: type) -> N:
    """The network that a stage trains: of `[model]` sizes with its first weights, or that of the source `start`.

    Of that `[model]` may change what is no size, such as the dropout. ValueError where one can't be had.
    """
    given, source = config.get("model", {}), config.get("start")
    if source is None:
        network = kind(from_table(sizes, given, "model"))
        if callable(begin := getattr(network, "init_weights", None)):
            begin()
        return network
    found = read_part(source, part)
    built = build_part(replace(found, params=from_table(sizes, {**asdict(found.params), **given}, "model")))
    assert isinstance(built, kind)
    for p in (*built.parameters(), *built.buffers()):  # what lies in the file is not to change
        p.data = p.data.to(torch.float32 if p.is_floating_point() else None, copy=True)
    return built.train().requires_grad_(True)


def base_metadata(sources: Sequence[str | Path]) -> dict[str, Any]:
    """What a network that is trained from sources says of them: the name of the first and, if known, all licences."""
    if not sources:
        return {}
    opened = (open_source(source, headers_only=True) for source in sources)
    return {"base": Path(sources[0]).name, **merge_licences(opened)}


def read_input(config: Mapping[str, Any], stage: str, part: str) -> Part:
    """What an earlier stage of the same run trained, or `[inputs]` names a source of; ValueError if it's not there."""
    source = input_source(config, stage)
    if not source_exists(source):
        raise ValueError(f"{source} is missing: train the {stage} first, or name its file as {stage} under [inputs]")
    return read_part(source, part)


def load_frozen(config: Mapping[str, Any], stage: str, part: str, kind: type[N]) -> N:
    """A network that an earlier stage of the same run trained, or that `[inputs]` names a source of."""
    network = build_part(read_input(config, stage, part), dtype=torch.float32)
    assert isinstance(network, kind)
    return network


def weights_fingerprint(config: Mapping[str, Any], name: str, tower: str = COMPUTED_BY["text"][1]) -> str:
    """The sha256 of the weights that compute what `MADE_BY` knows by this name; of texts, this `tower` of a bundle."""
    stage, part = COMPUTED_BY[name]
    digest = hashlib.sha256()
    for key, x in sorted(read_input(config, stage, tower if name == "text" else part).state_dict.items()):
        digest.update(f"{key} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def encode_features(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """Stage C features [B, 16, h, w] of pictures [B, 3, H, W] in [0, 1]."""
    return encoder(semantic_view(images.to(_place(encoder)))).cpu()


@torch.no_grad()
def encode_latents(vqgan: VQGAN, images: Tensor) -> Tensor:
    """Stage A latents [B, 4, H / 4, W / 4] of pictures, as Stage B works on them (unit variance)."""
    return vqgan.encode(images.to(_place(vqgan))).cpu() / vqgan.params.scale_factor


@torch.no_grad()
def encode_tokens(vqgan: VQGAN, latents: Tensor) -> Tensor:
    """Stage A tokens [B, h, w] of latents [B, 4, h, w] of unit variance."""
    return vqgan.quantize(latents.to(_place(vqgan)) * vqgan.params.scale_factor).indices.cpu()


@torch.no_grad()
def encode_text(tower: TextEncoder, prompts: list[str]) -> Tensor:
    """Text states [B, 77, c]."""
    return tower(*(x.to(_place(tower)) for x in tokenize(prompts))).cpu()


def _place(network: nn.Module) -> torch.device:
    return next(network.parameters()).device

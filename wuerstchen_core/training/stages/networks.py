"""The networks of a training run: the one that is trained, and the frozen ones that compute its inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints import Part, build_part
from ...checkpoints.components import TEXT_ENCODER, component
from ...checkpoints.lazy import LazyTensor
from ...checkpoints.modelspec import FIELD
from ...checkpoints.open import open_part, open_source
from ...checkpoints.shipped import SHIPPED
from ...checkpoints.source import is_stage_b, merge_licences
from ...checkpoints.writer import tensor_bytes
from ...common.dataclass_config import from_table
from ...common.devices import NETWORK_DTYPES
from ...inference.stages import first_weight
from ...models.image_encoder import ImageEncoder, semantic_view
from ...models.int8 import use_int8
from ...models.text_encoder import TextEncoder
from ...models.vqgan import VQGAN
from ..config import INPUTS, LoopConfig
from ..data.caption_tokens import Tokens
from ..stage import N, Stage

SAMPLED = ("prior", "decoder", "token_decoder")  # parts with settings of sampling
# What can be cached, and the stage whose network computes it.
COMPUTED_BY = {"latents": "vqgan", "features": "encoder", "text": "text"}


def input_source(config: Mapping[str, Any], stage: str) -> str | Path:
    """Returns the source of a stage's network: the one under `[inputs]`, else its file in the run folder."""
    return config.get("inputs", {}).get(stage, Path(config["run"]) / stage / f"{stage}.safetensors")


def source_exists(source: str | Path) -> bool:
    """True if the source is the name of a shipped file or an existing file or folder."""
    return source in SHIPPED or Path(source).exists()


def load_or_create(config: Mapping[str, Any], part: str, kind: type[N]) -> N:
    """Returns the network to train: loaded from `start`, or initialised with the sizes of `[model]`.

    With `start`, `[model]` may change only values such as dropout, not sizes. ValueError if the weights do not fit.
    """
    values, source, params = config.get("model", {}), config.get("start"), component(part).params
    if source is None:
        network = kind(from_table(params, values, "model"))
        if callable(init_weights := getattr(network, "init_weights", None)):
            init_weights()
        return network
    loaded = open_part(source, part)
    loaded = replace(loaded, params=from_table(params, asdict(loaded.params) | values, "model"))
    built = build_part(loaded, dtype=torch.float32)
    assert isinstance(built, kind)
    return built.train().requires_grad_(True)


def read_input(config: Mapping[str, Any], stage: str, part: str = "") -> Part[LazyTensor]:
    """Opens another stage's weights: `part` of its source, by default `INPUTS[stage]`. ValueError if it is missing."""
    source = input_source(config, stage)
    if not source_exists(source):
        raise ValueError(f"{source} is missing: train the {stage} first, or name its file as {stage} under [inputs]")
    return open_part(source, part or INPUTS[stage])


def load_frozen(config: Mapping[str, Any], stage: str, kind: type[N], part: str = "") -> N:
    """Loads the network of another stage. Arguments and errors as for `read_input`.

    Stage A and the image encoder, which compute what is trained on, are in fp32, others in the precision of `frozen`.
    """
    dtype = torch.float32 if kind in (VQGAN, ImageEncoder) else frozen_dtype(config)
    network = build_part(read_input(config, stage, part), dtype=torch.float32 if dtype == torch.int8 else dtype)
    assert isinstance(network, kind)
    if dtype == torch.int8:
        use_int8(network)
    return network


def frozen_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Returns the dtype of `frozen` under `[train]`; int8 is that of linear layers only."""
    return NETWORK_DTYPES[config.get("train", {}).get("frozen", LoopConfig.frozen)]


def base_metadata(
    sources: Sequence[str | Path], part: str = "", sampling: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the metadata of a part trained from sources: the first one's name and settings, and all known licences.

    `sampling` are the settings that training determined. A prior keeps its base's settings and vocabulary, a text
    encoder the vocabulary, a Stage B the settings of Stage B.
    """
    opened = [open_source(source, headers_only=True) for source in sources]
    base = opened[0].metadata if opened else {}
    kept = {key: x for key, x in base.get("sampling", {}).items() if part == "prior" or is_stage_b(key)}
    settings = {**(kept if part in SAMPLED else {}), **(sampling or {})}
    words = base.get("vocabulary") if part in ("prior", TEXT_ENCODER) else None
    return {
        **({"base": Path(sources[0]).name} if opened else {}),
        **merge_licences(opened),
        **({"sampling": settings} if settings else {}),
        **({"vocabulary": words} if words else {}),
    }


def weights_metadata(stage: Stage[Any]) -> dict[str, Any]:
    """Returns the metadata of a stage's weights, from their bases and from what the configuration states."""
    stated = {FIELD: dict(stage.stated)} if stage.stated else {}
    return base_metadata(stage.bases, stage.part, stage.sampling()) | stage.facts() | stated


def weights_fingerprint(config: Mapping[str, Any], name: str, text_part: str = "") -> str:
    """Returns the sha256 of the weights that compute `name`, a key of `COMPUTED_BY`; "text" of `text_part`."""
    digest = hashlib.sha256()
    weights = read_input(config, COMPUTED_BY[name], text_part if name == "text" else "")
    for key, lazy in sorted(weights.state_dict.items()):
        x = lazy.load()
        digest.update(f"{key} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(tensor_bytes(x))
    return digest.hexdigest()


@torch.no_grad()
def encode_features(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """Returns Stage C features [B, 16, h, w] of images [B, 3, H, W] in [0, 1], on the CPU."""
    return encoder(semantic_view(images.to(first_weight(encoder).device))).cpu()


@torch.no_grad()
def encode_latents(vqgan: VQGAN, images: Tensor) -> Tensor:
    """Returns Stage A latents [B, 4, H / 4, W / 4] of images, scaled to unit variance for Stage B, on the CPU."""
    return vqgan.encode(images.to(first_weight(vqgan).device)).cpu() / vqgan.params.scale_factor


@torch.no_grad()
def encode_tokens(vqgan: VQGAN, latents: Tensor) -> Tensor:
    """Returns Stage A tokens [B, h, w] of latents [B, 4, h, w] of unit variance, on the CPU."""
    return vqgan.quantize(latents.to(first_weight(vqgan).device) * vqgan.params.scale_factor).indices.cpu()


@torch.no_grad()
def encode_text(text_encoder: TextEncoder, tokens: Sequence[Tokens]) -> list[Tensor]:
    """Returns the text states [77 n, c] of tokens with n chunks, on the CPU."""
    ids, mask = (torch.cat(part).to(first_weight(text_encoder).device) for part in zip(*tokens, strict=True))
    chunks = text_encoder(ids, mask).cpu().split([len(one) for one, _ in tokens])
    return [states.flatten(0, 1) for states in chunks]

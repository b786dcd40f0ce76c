"""Registry of a model's networks: class, params, key marks, key map, release, and the ComfyUI node that loads each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias

from torch import Tensor, nn

from ..common.text import check_choice
from ..models.control_net import ControlNet, ControlNetParams
from ..models.decoder import Decoder, DecoderParams
from ..models.image_encoder import ImageEncoder, ImageEncoderParams
from ..models.prior import Prior, PriorParams
from ..models.text_encoder import TextEncoder, TextEncoderParams
from ..models.token_decoder import TokenDecoder, TokenDecoderParams
from ..models.vqgan import VQGAN, VQGANParams
from . import infer_params, key_maps
from .infer_params import CLIP_NAMES
from .lazy import AnyTensor

State: TypeAlias = dict[str, Tensor]
Params: TypeAlias = (
    PriorParams
    | DecoderParams
    | TokenDecoderParams
    | VQGANParams
    | ImageEncoderParams
    | TextEncoderParams
    | ControlNetParams
)

TEXT_ENCODER = "text_encoder"  # a text tower that serves both stages
TOWERS = (f"prior_{TEXT_ENCODER}", f"decoder_{TEXT_ENCODER}")


class Loader(NamedTuple):
    """A ComfyUI node that loads files, and the folder under ComfyUI's `models` that it reads."""

    folder: str
    node: str


MODEL_LOADER = Loader("diffusion_models", "Würstchen Model Loader")
TOKEN_LOADER = Loader("diffusion_models", "Würstchen Token Decoder Loader")
CLIP_LOADER = Loader("text_encoders", "Würstchen CLIP Loader")
VAE_LOADER = Loader("vae", "Würstchen VAE Loader")
CONTROL_LOADER = Loader("controlnet", "Würstchen ControlNet Loader")
BUNDLE_LOADER = Loader("checkpoints", "Würstchen Bundle Loader")  # for a whole v2 model


@dataclass(frozen=True)
class Component:
    """One kind of network. Everything that differs by kind is read from here.

    `marks` are keys that only this network's files have, in any layout. `to_ours` maps such a file's keys to ours.
    Complete models of these `releases` have it; with (), it is an extra that no model needs. `text_width` names the
    param with the width of the text states it reads.
    """

    stage: str
    network: Callable[..., nn.Module]
    params: type[Params]
    infer_params: Callable[..., Params]
    marks: tuple[str, ...]
    loader: Loader
    to_ours: Callable[[dict[str, Any]], dict[str, Any]] = dict
    releases: tuple[str, ...] = ("v1", "v2")
    text_width: str | None = None
    diffusers_class: str | None = None


COMPONENTS = {
    "prior": Component(
        stage="Stage C",
        network=Prior,
        params=PriorParams,
        infer_params=infer_params.prior_params,
        marks=("cond_mapper.0.weight",),
        loader=MODEL_LOADER,
        to_ours=key_maps.split_attention,
        text_width="c_cond",
        diffusers_class="WuerstchenPrior",
    ),
    "decoder": Component(
        stage="Stage B",
        network=Decoder,
        params=DecoderParams,
        infer_params=infer_params.decoder_params,
        marks=("clip_mapper.weight",),
        loader=MODEL_LOADER,
        to_ours=key_maps.split_attention,
        releases=("v2",),
        text_width="clip_embd",
        diffusers_class="WuerstchenDiffNeXt",
    ),
    "token_decoder": Component(
        stage="Stage B",
        network=TokenDecoder,
        params=TokenDecoderParams,
        infer_params=infer_params.token_decoder_params,
        marks=("byt5_mapper.weight",),
        loader=TOKEN_LOADER,
        to_ours=key_maps.pack_attention,
        releases=("v1",),
        text_width="byt5_embd",
    ),
    "vqgan": Component(
        stage="Stage A",
        network=VQGAN,
        params=VQGANParams,
        infer_params=infer_params.vqgan_params,
        marks=("in_block.1.weight",),
        loader=VAE_LOADER,
        to_ours=key_maps.vqgan_from_diffusers,
        diffusers_class="PaellaVQModel",
    ),
    "image_encoder": Component(
        stage="semantic compressor",
        network=ImageEncoder,
        params=ImageEncoderParams,
        infer_params=infer_params.image_encoder_params,
        marks=("backbone.0.0.weight",),
        loader=VAE_LOADER,
    ),
    TEXT_ENCODER: Component(
        stage="text",
        network=TextEncoder,
        params=TextEncoderParams,
        infer_params=infer_params.text_encoder_params,
        marks=tuple(
            f"{prefix}token_embedding.weight" for prefix in ("", "text.", "embeddings.", "text_model.embeddings.")
        ),
        loader=CLIP_LOADER,
        to_ours=key_maps.text_from_any,
    ),
    "control_net": Component(
        stage="hints for Stage C",
        network=ControlNet,
        params=ControlNetParams,
        infer_params=infer_params.control_net_params,
        marks=("hint_stem.weight",),
        loader=CONTROL_LOADER,
        releases=(),
    ),
}


def parts_of(kind: str) -> tuple[str, ...]:
    """Returns the names of a kind of network in a model: for "text_encoder" those of both stages' towers."""
    return TOWERS if kind == TEXT_ENCODER else (kind,)


def parts_loaded_by(loader: Loader) -> tuple[str, ...]:
    """Returns the names of the parts that a ComfyUI node loads."""
    return tuple(part for kind, entry in COMPONENTS.items() if entry.loader == loader for part in parts_of(kind))


PARTS = tuple(part for kind in COMPONENTS for part in parts_of(kind))
PARTS_OF = {  # the parts of a complete model, by release
    release: tuple(part for kind, c in COMPONENTS.items() if release in c.releases for part in parts_of(kind))
    for release in ("v1", "v2")
}


@dataclass
class Part(Generic[AnyTensor]):
    """One network of a model: its params, its weights under our key names, and the file or folder they are from.

    The weights of a Part[LazyTensor] are computed one by one, as they are written.
    """

    name: str
    params: Any
    state_dict: dict[str, AnyTensor]
    path: Path | None = None
    trained: tuple[float, float] | None = None  # of a prior: the sides of its training images, see `trained_sides`

    @property
    def parameters(self) -> int:
        """The number of values in the tensors."""
        return sum(math.prod(x.shape) for x in self.state_dict.values())


def check_part_name(name: str) -> None:
    """Raises ValueError unless `name` is a part of a model, or "text_encoder" for a tower that serves both stages."""
    check_choice("part", name, (*PARTS, TEXT_ENCODER))


def component(name: str) -> Component:
    """Returns the registry's entry for a part, or for "text_encoder". Raises ValueError for other names."""
    check_part_name(name)
    return COMPONENTS[kind_of(name)]


def kind_of(name: str) -> str:
    """Returns the kind of network of a part: its name, but "text_encoder" for either stage's tower."""
    return TEXT_ENCODER if name in TOWERS else name


def component_of(params: Any) -> Component | None:
    """Returns the registry's entry for params of its class; None for other classes."""
    return next((entry for entry in COMPONENTS.values() if isinstance(params, entry.params)), None)


def text_width(params: Params) -> int | None:
    """Returns the width of the text states that a network reads; None if it reads none."""
    entry = component_of(params)
    return getattr(params, entry.text_width) if entry and entry.text_width else None


def tower_widths(parts: Mapping[str, Part]) -> dict[str, int]:
    """Returns the width that each text tower must have for the stages among `parts`."""
    widths = {name: text_width(part.params) for name, part in parts.items()}
    return {f"{name.removeprefix('token_')}_{TEXT_ENCODER}": width for name, width in widths.items() if width}


def tower_name(width: int) -> str:
    """Returns the name of the text tower with states of this width."""
    return f"{CLIP_NAMES[width]} (width {width})" if width in CLIP_NAMES else f"a text tower of width {width}"

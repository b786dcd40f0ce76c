"""The parts a model is made of: their names, their networks, and their sizes as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..common.dataclass_config import from_table
from ..models.decoder import Decoder, DecoderParams
from ..models.image_encoder import ImageEncoder, ImageEncoderParams
from ..models.prior import V1, Prior, PriorParams
from ..models.text_encoder import TextEncoder, TextEncoderParams
from ..models.token_decoder import TokenDecoder, TokenDecoderParams
from ..models.vqgan import VQGAN, VQGANParams
from .lazy import Planned

PARTS = ("prior", "decoder", "token_decoder", "vqgan", "image_encoder", "prior_text_encoder", "decoder_text_encoder")
PARTS_OF = {  # what a complete model of a release has
    "v1": tuple(name for name in PARTS if name != "decoder"),
    "v2": tuple(name for name in PARTS if name != "token_decoder"),
}
TEXT_ENCODER = "text_encoder"  # where one tower serves both stages
NAMED = 3  # how many keys a sentence names

_TOWERS = {1280: "CLIP-bigG", 1024: "CLIP-H"}  # by the width of their states

State: TypeAlias = dict[str, Tensor]
Params: TypeAlias = (
    PriorParams | DecoderParams | TokenDecoderParams | VQGANParams | ImageEncoderParams | TextEncoderParams
)

PARAMS: dict[str, type[Params]] = {
    "prior": PriorParams,
    "decoder": DecoderParams,
    "token_decoder": TokenDecoderParams,
    "vqgan": VQGANParams,
    "image_encoder": ImageEncoderParams,
    TEXT_ENCODER: TextEncoderParams,
}
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "prior": Prior,
    "decoder": Decoder,
    "token_decoder": TokenDecoder,
    "vqgan": VQGAN,
    "image_encoder": ImageEncoder,
    TEXT_ENCODER: TextEncoder,
}


@dataclass
class Part:
    """One network's sizes (its params dataclass) and weights under our names, as in the file, mapped if possible."""

    name: str
    params: Any
    state_dict: State


@dataclass
class PlannedPart:
    """A part whose tensors are made one by one, as they are written."""

    name: str
    params: Any
    tensors: dict[str, Planned]


def kind_of(name: str) -> str:
    """The kind of network that a part is: its name, but `text_encoder` for either stage's tower."""
    kind = TEXT_ENCODER if name.endswith(TEXT_ENCODER) else name
    if name not in PARTS and name != TEXT_ENCODER:
        raise ValueError(f"{name!r} is no part of a model: the parts are {', '.join(PARTS)}")
    return kind


def listed(keys: Sequence[str]) -> str:
    """The first few keys."""
    return f"{', '.join(keys[:NAMED])}{', ...' if len(keys) > NAMED else ''}"


def text_width(params: Params) -> int | None:
    """How wide the text states are that a stage reads; None if it reads none."""
    if isinstance(params, PriorParams):
        return params.c_cond
    if isinstance(params, TokenDecoderParams):
        return params.byt5_embd
    return params.clip_embd if isinstance(params, DecoderParams) else None


def tower_name(width: int) -> str:
    """The text tower that gives states of this width."""
    return f"{_TOWERS[width]} ({width} wide)" if width in _TOWERS else f"a tower {width} wide"


def check_towers(parts: Mapping[str, Part | PlannedPart]) -> None:
    """Raise ValueError unless each text tower is as wide as the stage that reads it needs."""
    for stage in ("prior", "decoder", "token_decoder"):
        tower = parts.get(f"{stage.removeprefix('token_')}_{TEXT_ENCODER}")
        needed = text_width(parts[stage].params) if stage in parts else None
        if tower is not None and needed is not None and tower.params.width != needed:
            raise ValueError(
                f"the {stage.replace('_', ' ')} reads the text through {tower_name(needed)}, but its text encoder is "
                f"{tower_name(tower.params.width)}: give it its own"
            )


def release(sizes: Iterable[Params]) -> str:
    """The release that networks belong to: "v1" if one is of a kind or works in units that v2 does not know."""
    for params in sizes:
        if isinstance(params, TokenDecoderParams):
            return "v1"
        if isinstance(params, PriorParams) and params.feature_scale == V1["feature_scale"]:
            return "v1"
    return "v2"


def params_to_json(params: Params) -> dict[str, Any]:
    """Sizes as plain JSON values."""
    return asdict(params)


def params_from_json(name: str, values: Mapping[str, Any]) -> Params:
    """Sizes of part `name` from the values that `params_to_json` gave."""
    try:
        return from_table(PARAMS[kind_of(name)], values, name)
    except ValueError as error:
        raise ValueError(f"the sizes in the file's metadata do not fit this version: {error}") from error

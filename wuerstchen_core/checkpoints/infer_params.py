"""Infers a network's params from the shapes of its tensors (under our key names)."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from ..models.control_net import ControlNetParams
from ..models.decoder import DecoderParams
from ..models.image_encoder import EFFICIENTNET_V2_L, EFFICIENTNET_V2_S, ImageEncoderParams
from ..models.prior import PriorParams
from ..models.text_encoder import CLIP_BIGG, CLIP_H, TextEncoderParams
from ..models.token_decoder import TokenDecoderParams
from ..models.vqgan import VQGANParams
from .lazy import LazyTensor

HEAD_WIDTH = 64  # of every attention in the released networks and ours, except the token decoder
LONGEST_LIST = 1000  # module list of a file with fewer tensors
TOKEN_HEADS = 16  # number of heads in the token decoder, at every width

# The kind of a block in a decoder's level, by a tensor that only this kind has. The first match wins.
_BLOCK_MARKS = (
    ("depthwise.weight", "C"),
    ("mapper.weight", "T"),
    ("attention.to_q.weight", "A"),
    ("attention.attn.in_proj_weight", "A"),
    ("channelwise.0.weight", "F"),
)

CLIP_NAMES = {CLIP_BIGG.width: "CLIP-bigG", CLIP_H.width: "CLIP-H"}  # Würstchen's text towers: the prior's first
# Text towers of other models, by width and layers. They would load, and give wrong images.
_QUICK = "uses quick_gelu instead of gelu"
_OTHER_TOWERS = {
    (CLIP_H.width, CLIP_H.layers - 1): "is Stable Diffusion 2's CLIP-H, which lacks the last layer",
    (768, 12): f"is CLIP-L, which {_QUICK}",
    (512, 12): f"is CLIP-B, which {_QUICK}",
}
TOWER_ADVICE = "use the text_encoder of warp-ai/wuerstchen (CLIP-H) or warp-ai/wuerstchen-prior (CLIP-bigG)"

Tensors = Mapping[str, Tensor | LazyTensor]


def _shape(state: Tensors, key: str, dimensions: int = 2) -> tuple[int, ...]:
    """Returns a tensor's shape. Raises ValueError if it is missing, empty or has fewer dimensions."""
    if key not in state:
        raise ValueError(f"the weights are incomplete: {key} is missing")
    shape = tuple(state[key].shape)
    if len(shape) < dimensions or 0 in shape:
        raise ValueError(f"the weights are damaged: {key} is {list(shape)}, expected {dimensions} dimensions or more")
    return shape


def _heads(width: int) -> int:
    if width % HEAD_WIDTH:
        raise ValueError(
            f"the number of attention heads is unknown: {width} is not a multiple of {HEAD_WIDTH}, and there is "
            "neither metadata nor a config.json that gives it"
        )
    return width // HEAD_WIDTH


def _count(state: Tensors, prefix: str) -> int:
    """Returns the length of the module list under `prefix`. Raises ValueError if its keys are damaged."""
    entries = (key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix))
    count = 1 + max((int(entry) for entry in entries if entry.isdecimal()), default=-1)
    if count > max(len(state), LONGEST_LIST):
        raise ValueError(f"the weights are damaged: {prefix}{count - 1} has no place among {len(state)} tensors")
    return count


def prior_params(state: Tensors, nhead: int | None = None) -> PriorParams:
    """Returns the params of a Prior; `nhead` is needed if the heads are not 64 wide."""
    c, c_in = _shape(state, "projection.weight")[:2]
    return PriorParams(
        c_in=c_in,
        c=c,
        c_cond=_shape(state, "cond_mapper.0.weight")[1],
        c_r=_shape(state, "blocks.1.mapper.weight")[1],
        depth=_count(state, "blocks.") // 3,
        nhead=_heads(c) if nhead is None else nhead,
    )


def _pattern(kinds: str) -> tuple[str, int]:
    """Returns the shortest pattern whose repetition gives `kinds`, and the number of repetitions."""
    length = next((n for n in range(1, len(kinds)) if kinds == kinds[:n] * (len(kinds) // n)), len(kinds))
    return kinds[:length], len(kinds) // max(length, 1)


def _level(state: Tensors, level: int) -> str:
    """Returns the kinds of the blocks in a down level, such as CTACTA."""
    first = 1 if level else 0  # after the downsampler
    blocks = [f"down_blocks.{level}.{i}." for i in range(first, _count(state, f"down_blocks.{level}."))]
    kinds = [next((kind for mark, kind in _BLOCK_MARKS if block + mark in state), "") for block in blocks]
    if "" in kinds:
        raise ValueError(f"the weights are incomplete: {blocks[kinds.index('')]}* is not a known decoder block")
    return "".join(kinds)


def _levels(state: Tensors, c_r: int) -> dict[str, Any]:
    """Returns the params that the two decoders share, with `c_r` if no block has a time embedding."""
    levels = range(_count(state, "down_blocks."))
    patterns = [_pattern(_level(state, i)) for i in levels]
    times = (x for key, x in state.items() if key.startswith("down_blocks.") and key.endswith(".mapper.weight"))
    return {
        "c_r": next((x.shape[1] for x in times), c_r),
        "c_hidden": (
            _shape(state, "embedding.1.weight")[0],
            *(_shape(state, f"down_blocks.{i}.0.1.weight")[0] for i in levels[1:]),
        ),
        "blocks": tuple(repeats for _, repeats in patterns),
        "level_config": tuple(kinds for kinds, _ in patterns),
        "kernel_size": _shape(state, "down_blocks.0.0.depthwise.weight")[-1],
    }


def decoder_params(state: Tensors, nhead: tuple[int, ...] | None = None) -> DecoderParams:
    """Returns the params of a Decoder; `nhead` is needed if the heads are not 64 wide."""
    base = DecoderParams()
    shared = _levels(state, base.c_r)
    c_patches = _shape(state, "embedding.1.weight")[1]
    patch_size = isqrt(c_patches // base.c_in)
    c_cond, clip_embd = _shape(state, "clip_mapper.weight")[:2]
    mappers = [state.get(f"effnet_mappers.{i}.weight") for i in range(len(shared["blocks"]))]
    if nhead is None:
        levels = zip(shared["c_hidden"], shared["level_config"], strict=True)
        nhead = tuple(_heads(c) if "A" in kinds else -1 for c, kinds in levels)
    return DecoderParams(
        c_in=c_patches // patch_size**2,
        c_out=_shape(state, "clf.1.weight")[0] // (2 * patch_size**2),
        patch_size=patch_size,
        c_cond=c_cond,
        nhead=nhead,
        inject_effnet=tuple(x is not None for x in mappers),
        effnet_embd=next((x.shape[1] for x in mappers if x is not None), base.effnet_embd),
        clip_embd=clip_embd,
        **shared,
    )


def token_decoder_params(state: Tensors, nhead: tuple[int, ...] | None = None) -> TokenDecoderParams:
    """Returns the params of a TokenDecoder; `nhead` is needed if a level with attention does not have 16 heads."""
    shared = _levels(state, TokenDecoderParams.c_r)
    num_labels, c_in = _shape(state, "in_mapper.0.weight")[:2]
    c_cond, byt5_embd = _shape(state, "byt5_mapper.weight")[:2]
    if nhead is None:
        nhead = tuple(TOKEN_HEADS if "A" in kinds else -1 for kinds in shared["level_config"])
    return TokenDecoderParams(
        c_in=c_in,
        c_out=_shape(state, "out_mapper.1.weight")[1],
        num_labels=num_labels,
        patch_size=isqrt(_shape(state, "embedding.1.weight")[1] // c_in),
        c_cond=c_cond,
        nhead=nhead,
        effnet_embd=_shape(state, "effnet_mapper.weight")[1],
        byt5_embd=byt5_embd,
        **shared,
    )


def vqgan_params(state: Tensors) -> VQGANParams:
    """Returns the params of a VQGAN. No tensor shows the scale factor: it is the released model's."""
    levels = sum(key.startswith("down_blocks.") and key.endswith(".gammas") for key in state)
    blocks_up = sum(key.startswith("up_blocks.") and key.endswith(".gammas") for key in state)
    codebook_size, c_latent = _shape(state, "vquantizer.codebook.weight")[:2]
    return VQGANParams(
        levels=levels,
        bottleneck_blocks=blocks_up - levels + 1,
        c_hidden=_shape(state, "in_block.1.weight")[0] << max(levels - 1, 0),
        c_latent=c_latent,
        codebook_size=codebook_size,
    )


def image_encoder_params(state: Tensors) -> ImageEncoderParams:
    """Returns the params of an EfficientNetV2-S or L; other stage tables cannot be inferred."""
    c_latent, last_channel = _shape(state, "mapper.0.weight")[:2]
    for stages in (EFFICIENTNET_V2_S, EFFICIENTNET_V2_L):
        head = state.get(f"backbone.{len(stages) + 1}.0.weight")
        if head is not None and tuple(head.shape) == (last_channel, stages[-1][5], 1, 1):
            return ImageEncoderParams(stages, last_channel, c_latent)
    raise ValueError(
        "the image encoder is neither EfficientNetV2-S nor L, and the file has no metadata with its stage table: "
        "use the original file"
    )


def text_encoder_params(state: Tensors, heads: int | None = None) -> TextEncoderParams:
    """Returns the params of a TextEncoder; `heads` is needed if they are not 64 wide."""
    vocab_size, width = _shape(state, "token_embedding.weight")[:2]
    layers = _count(state, "transformer.resblocks.")
    if (width, layers) in _OTHER_TOWERS:
        raise ValueError(f"this text tower {_OTHER_TOWERS[width, layers]}: {TOWER_ADVICE}")
    return TextEncoderParams(
        width=width,
        heads=_heads(width) if heads is None else heads,
        layers=layers,
        vocab_size=vocab_size,
        context_length=_shape(state, "positional_embedding")[0],
        mlp_ratio=_shape(state, "transformer.resblocks.0.mlp.c_fc.weight")[0] / width,
    )


def control_net_params(state: Tensors) -> ControlNetParams:
    """Raises ValueError: no tensor shows the release and the depth of the prior that a ControlNet is for."""
    raise ValueError(
        "this ControlNet has lost its header, which names the prior and the hints that it is for: use the original file"
    )

"""Sizes of a network, read off the shapes of its tensors (our key names)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt

from torch import Tensor

from ..models.decoder import DecoderParams
from ..models.image_encoder import EFFICIENTNET_V2_L, EFFICIENTNET_V2_S, ImageEncoderParams
from ..models.prior import PriorParams
from ..models.text_encoder import TextEncoderParams
from ..models.token_decoder import TokenDecoderParams
from ..models.vqgan import VQGANParams
from .components import TEXT_ENCODER, Params
from .lazy import Planned

HEAD_WIDTH = 64  # of every attention in the released networks and in ours, but for
TOKEN_HEADS = 16  # the number of heads, in the token decoder, however wide they are

# What a block of a decoder's level is, by the tensor that only it has; the first that fits wins.
_BLOCK_MARKS = (
    ("depthwise.weight", "C"),
    ("mapper.weight", "T"),
    ("attention.to_q.weight", "A"),
    ("attention.attn.in_proj_weight", "A"),
    ("channelwise.0.weight", "F"),
)

# Towers that other models read, by width and layers: like enough to load, and wrong.
_QUICK = "computes with quick_gelu and is not the tower of any Würstchen"
_OTHER_TOWERS = {
    (1024, 23): "is Stable Diffusion 2's CLIP-H, whose last layer was left out, and Würstchen reads the last",
    (768, 12): f"is CLIP-L, which {_QUICK}",
    (512, 12): f"is CLIP-B, which {_QUICK}",
}
WHOLE_TOWERS = "take the text_encoder of warp-ai/wuerstchen (CLIP-H) or warp-ai/wuerstchen-prior (CLIP-bigG)"

Tensors = Mapping[str, Tensor | Planned]


def _shape(state: Tensors, key: str) -> tuple[int, ...]:
    if key not in state:
        raise ValueError(f"the weights are incomplete: {key} is missing")
    return tuple(state[key].shape)


def _heads(width: int) -> int:
    if width % HEAD_WIDTH:
        raise ValueError(
            f"the number of heads of a network {width} wide is unknown: heads are {HEAD_WIDTH} wide "
            "unless the file's metadata or a config.json beside it says otherwise"
        )
    return width // HEAD_WIDTH


def _count(state: Tensors, prefix: str) -> int:
    """How many entries the list under `prefix` has."""
    entries = (key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix))
    return 1 + max((int(entry) for entry in entries if entry.isdecimal()), default=-1)


def prior_params(state: Tensors, nhead: int | None = None) -> PriorParams:
    """Sizes of a Prior; `nhead` where the heads are not 64 wide."""
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
    """The shortest pattern that repeated gives `kinds`, and how often."""
    for length in range(1, len(kinds) + 1):
        repeats, rest = divmod(len(kinds), length)
        if not rest and kinds[:length] * repeats == kinds:
            return kinds[:length], repeats
    return "", 0


def _level(state: Tensors, level: int) -> str:
    """The kinds of a level's blocks on the way down, such as CTACTA."""
    kinds = ""
    for i in range(1 if level else 0, _count(state, f"down_blocks.{level}.")):
        block = f"down_blocks.{level}.{i}."
        kind = next((kind for mark, kind in _BLOCK_MARKS if block + mark in state), None)
        if kind is None:
            raise ValueError(f"the weights are incomplete: {block}* is no block of a decoder")
        kinds += kind
    return kinds


def _level_widths(state: Tensors) -> tuple[int, ...]:
    """How wide a decoder's levels are."""
    first = _shape(state, "embedding.1.weight")[0]
    levels = range(1, _count(state, "down_blocks."))
    return (first, *(_shape(state, f"down_blocks.{i}.0.1.weight")[0] for i in levels))


def _time_width(state: Tensors, otherwise: int) -> int:
    """The width of a decoder's time embedding."""
    times = (key for key in state if key.startswith("down_blocks.") and key.endswith(".mapper.weight"))
    return next((state[key].shape[1] for key in times if not key.endswith("kv_mapper.weight")), otherwise)


def decoder_params(state: Tensors, nhead: tuple[int, ...] | None = None) -> DecoderParams:
    """Sizes of a Decoder; `nhead` where the heads are not 64 wide."""
    base = DecoderParams()
    levels = range(_count(state, "down_blocks."))
    c_patches = _shape(state, "embedding.1.weight")[1]
    patch_size = isqrt(c_patches // base.c_in)
    c_hidden = _level_widths(state)
    patterns = [_pattern(_level(state, i)) for i in levels]
    c_cond, clip_embd = _shape(state, "clip_mapper.weight")
    inject = tuple(f"effnet_mappers.{i}.weight" in state for i in levels)
    effnet = next((state[f"effnet_mappers.{i}.weight"].shape[1] for i in levels if inject[i]), base.effnet_embd)
    if nhead is None:
        nhead = tuple(_heads(c) if "A" in kinds else -1 for c, (kinds, _) in zip(c_hidden, patterns, strict=True))
    return DecoderParams(
        c_in=c_patches // patch_size**2,
        c_out=_shape(state, "clf.1.weight")[0] // (2 * patch_size**2),
        c_r=_time_width(state, base.c_r),
        patch_size=patch_size,
        c_cond=c_cond,
        c_hidden=c_hidden,
        nhead=nhead,
        blocks=tuple(repeats for _, repeats in patterns),
        level_config=tuple(kinds for kinds, _ in patterns),
        inject_effnet=inject,
        effnet_embd=effnet,
        clip_embd=clip_embd,
        kernel_size=_shape(state, "down_blocks.0.0.depthwise.weight")[-1],
    )


def token_decoder_params(state: Tensors, nhead: tuple[int, ...] | None = None) -> TokenDecoderParams:
    """Sizes of a TokenDecoder; `nhead` where a level with attention has not 16 heads."""
    num_labels, c_in = _shape(state, "in_mapper.0.weight")
    patterns = [_pattern(_level(state, i)) for i in range(_count(state, "down_blocks."))]
    c_cond, byt5_embd = _shape(state, "byt5_mapper.weight")
    if nhead is None:
        nhead = tuple(TOKEN_HEADS if "A" in kinds else -1 for kinds, _ in patterns)
    return TokenDecoderParams(
        c_in=c_in,
        c_out=_shape(state, "out_mapper.1.weight")[1],
        num_labels=num_labels,
        c_r=_time_width(state, TokenDecoderParams.c_r),
        patch_size=isqrt(_shape(state, "embedding.1.weight")[1] // c_in),
        c_cond=c_cond,
        c_hidden=_level_widths(state),
        nhead=nhead,
        blocks=tuple(repeats for _, repeats in patterns),
        level_config=tuple(kinds for kinds, _ in patterns),
        effnet_embd=_shape(state, "effnet_mapper.weight")[1],
        byt5_embd=byt5_embd,
        kernel_size=_shape(state, "down_blocks.0.0.depthwise.weight")[-1],
    )


def vqgan_params(state: Tensors) -> VQGANParams:
    """Sizes of a VQGAN; the scale factor is in no tensor and stays the released model's."""
    levels = sum(key.startswith("down_blocks.") and key.endswith(".gammas") for key in state)
    blocks_up = sum(key.startswith("up_blocks.") and key.endswith(".gammas") for key in state)
    codebook_size, c_latent = _shape(state, "vquantizer.codebook.weight")
    return VQGANParams(
        levels=levels,
        bottleneck_blocks=blocks_up - levels + 1,
        c_hidden=_shape(state, "in_block.1.weight")[0] << max(levels - 1, 0),
        c_latent=c_latent,
        codebook_size=codebook_size,
    )


def image_encoder_params(state: Tensors) -> ImageEncoderParams:
    """Sizes of an ImageEncoder with EfficientNetV2's S or L stage table: others can't be read off tensors."""
    c_latent, last_channel = _shape(state, "mapper.0.weight")[:2]
    for stages in (EFFICIENTNET_V2_S, EFFICIENTNET_V2_L):
        head = state.get(f"backbone.{len(stages) + 1}.0.weight")
        if head is not None and tuple(head.shape) == (last_channel, stages[-1][5], 1, 1):
            return ImageEncoderParams(stages, last_channel, c_latent)
    raise ValueError(
        "the image encoder is neither EfficientNetV2-S nor L, and the file's metadata, which should hold its stage "
        "table, is lost: take the file as it was published"
    )


def text_encoder_params(state: Tensors, heads: int | None = None) -> TextEncoderParams:
    """Sizes of a TextEncoder; `heads` where they are not 64 wide."""
    vocab_size, width = _shape(state, "token_embedding.weight")
    layers = _count(state, "transformer.resblocks.")
    if (width, layers) in _OTHER_TOWERS:
        raise ValueError(f"this text tower {_OTHER_TOWERS[width, layers]}: {WHOLE_TOWERS}")
    return TextEncoderParams(
        width=width,
        heads=_heads(width) if heads is None else heads,
        layers=layers,
        vocab_size=vocab_size,
        context_length=_shape(state, "positional_embedding")[0],
        mlp_ratio=_shape(state, "transformer.resblocks.0.mlp.c_fc.weight")[0] / width,
    )


READERS: dict[str, Callable[..., Params]] = {
    "prior": prior_params,
    "decoder": decoder_params,
    "token_decoder": token_decoder_params,
    "vqgan": vqgan_params,
    "image_encoder": image_encoder_params,
    TEXT_ENCODER: text_encoder_params,
}

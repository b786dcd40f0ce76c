"""Less memory for more time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..models.attention import AttnBlock
from ..models.layers import FeedForwardBlock, ResBlock
from ..models.text_encoder import TextEncoder

BLOCKS = (ResBlock, AttnBlock, FeedForwardBlock)


def recompute_blocks(net: nn.Module) -> None:
    """Let the blocks of a network keep only their inputs, and compute the rest again for the gradients
    (gradient checkpointing, arXiv 1604.06174). ValueError if it has none of them."""
    blocks = list(_blocks(net))
    if not blocks:
        raise ValueError(
            "[train] checkpointing is for priors, decoders and text towers, whose blocks it computes again: "
            "leave it out"
        )
    for block in blocks:
        _recompute(block)


def _blocks(net: nn.Module) -> Iterator[nn.Module]:
    for module in net.modules():
        if isinstance(module, BLOCKS):
            yield module
        elif isinstance(module, TextEncoder):
            yield from module.transformer.resblocks


def _recompute(block: nn.Module) -> None:
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)

"""The original's initialisation before training."""

from __future__ import annotations

import math

import torch
from torch import nn

from .attention import Attention, PackedProjections
from .layers import FeedForwardBlock, ResBlock, TimestepBlock


def xavier_init(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases; pass it to `Module.apply`."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, PackedProjections):
        nn.init.xavier_uniform_(module.in_proj_weight)
        nn.init.zeros_(module.in_proj_bias)
    elif isinstance(module, Attention):  # the original has one matrix [3c, c], whose Xavier bound is smaller
        for layer in (module.to_q, module.to_k, module.to_v):
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(0.5))


@torch.no_grad()
def init_blocks(blocks: nn.Module, depth: int) -> None:
    """Shrinks residual branches by sqrt(1 / depth) and sets time mappers to zero."""
    for block in blocks.modules():
        if isinstance(block, ResBlock | FeedForwardBlock):
            block.channelwise[-1].get_parameter("weight").mul_(math.sqrt(1 / depth))
        elif isinstance(block, TimestepBlock):
            nn.init.zeros_(block.mapper.weight)

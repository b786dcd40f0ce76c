"""How the original draws weights before training."""

from __future__ import annotations

import math

import torch
from torch import nn

from .attention import Attention, Projections
from .layers import FeedForwardBlock, ResBlock, TimestepBlock


def xavier_init(module: nn.Module) -> None:
    """The original's general initialisation: Xavier-uniform weights, zero biases (use with `Module.apply`)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Projections):
        nn.init.xavier_uniform_(module.in_proj_weight)
        nn.init.zeros_(module.in_proj_bias)
    elif isinstance(module, Attention):  # the original's are one matrix [3c, c], whose Xavier bound is smaller
        for layer in (module.to_q, module.to_k, module.to_v):
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(0.5))


@torch.no_grad()
def init_blocks(blocks: nn.Module, depth: int) -> None:
    """The original's initialisation of residual branches (shrunk by sqrt(1 / depth)) and time mappers (zero)."""
    for block in blocks.modules():
        if isinstance(block, ResBlock | FeedForwardBlock):
            block.channelwise[-1].get_parameter("weight").mul_(math.sqrt(1 / depth))
        elif isinstance(block, TimestepBlock):
            nn.init.zeros_(block.mapper.weight)

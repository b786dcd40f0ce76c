"""`torch.compile`, where torch can: it needs a C++ compiler, on a GPU Triton, and nobody has to have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .models.attention import AttnBlock
from .models.layers import FeedForwardBlock, ResBlock, TimestepBlock

BLOCKS = (ResBlock, TimestepBlock, AttnBlock, FeedForwardBlock)
GRAPHS = 64  # of a kind of block: by its width, what joins it, its dtype, and what torch tells apart


def can_compile(device: Any, **options: Any) -> bool:
    """Try it on next to nothing: what it needs differs with the device and the system, and with its `options`."""
    try:
        torch.compile(lambda x: x + 1, **options)(torch.zeros(8, device=device))
    except RuntimeError:  # all that torch's compiler raises is one
        return False
    return True


def compile_network(network: nn.Module, **options: Any) -> None:
    """Let torch compile a denoiser's blocks when they are first called; `options` are `torch.compile`'s.

    Blocks that are alike share their graphs, so that a prior of 32 repetitions compiles as quickly as one of 1: as a
    whole it would take eight times as long. A graph serves all sizes and batches, but for what torch itself
    tells apart: a single picture from several, and on a CPU which convolution is the quickest.
    """
    import torch._dynamo as dynamo  # takes a second, which only those shall pay who compile

    dynamo.config.cache_size_limit = max(dynamo.config.cache_size_limit, GRAPHS)
    for block in network.modules():
        if isinstance(block, BLOCKS) and "forward" not in vars(block):  # not a second time
            _compile(block, dynamo.maybe_mark_dynamic, options)


def _compile(block: nn.Module, mark: Any, options: dict[str, Any]) -> None:
    compiled = torch.compile(block.forward, dynamic=True, **options)

    def forward(*given: Any) -> Tensor:
        for x in given:
            for y in x if isinstance(x, tuple) else (x,):
                if isinstance(y, Tensor):  # else sides that happen to be equal would have to stay equal
                    mark(y, list(range(y.dim())))
        return compiled(*given)

    block.forward = forward

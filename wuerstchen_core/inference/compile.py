"""Compiles the denoisers with `torch.compile`, which needs a C++ compiler and, on a GPU, Triton."""

from __future__ import annotations

import logging
from collections.abc import Callable
from inspect import signature
from textwrap import shorten
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..models.attention import AttnBlock
from ..models.layers import FeedForwardBlock, ResBlock, TimestepBlock

logger = logging.getLogger(__name__)

BLOCKS = (ResBlock, TimestepBlock, AttnBlock, FeedForwardBlock)
MAX_GRAPHS = 64  # per class of block: they differ in width, injected channels, dtype, and what torch distinguishes
MAX_ERROR = 150  # characters of torch's message


def can_compile(device: Any, **options: Any) -> bool:
    """True if `torch.compile` works on a tiny function. Otherwise logs the reason.

    Raises ValueError for options that torch does not know.
    """
    try:
        torch.compile(_add_one)  # fails if this torch cannot compile on this system or for this Python
        try:
            compiled = torch.compile(_add_one, **options)
        except (RuntimeError, TypeError, AttributeError) as error:
            values = ", ".join(f"{name}={shorten(repr(value), 40)}" for name, value in options.items())
            raise ValueError(f"torch.compile refuses {values}: {shorten(str(error), MAX_ERROR)}") from error
        compiled(torch.zeros(8, device=device))
    except (RuntimeError, OSError) as error:  # from torch's compilers, or a cache folder that is not writable
        reason = shorten(str(error), MAX_ERROR)
        logger.warning("torch.compile does not work here, so the networks run uncompiled: %s", reason)
        return False
    return True


def _add_one(x: Tensor) -> Tensor:
    return x + 1


def compile_network(network: nn.Module, **options: Any) -> None:
    """Compiles a denoiser's blocks at their first call; `options` are `torch.compile`'s.

    Blocks of one class share their graphs, so that a prior of 32 repetitions compiles as fast as one of 1; as a whole
    it would take eight times as long. A graph serves all sizes and batches, except for what torch distinguishes: one
    picture from several and, on a CPU, which convolution is the fastest.

    Blocks with hooks run uncompiled; hooks added to a block's inner layers after its first call are not seen. Copies of
    the network are not compiled.
    """
    import torch._dynamo as dynamo  # takes a second

    settings = {"dynamic": True, **options}
    if "recompile_limit" in signature(torch.compile).parameters:
        settings["recompile_limit"] = MAX_GRAPHS
    else:  # older versions of torch have one global limit
        dynamo.config.cache_size_limit = max(dynamo.config.cache_size_limit, MAX_GRAPHS)
    calls: dict[type[nn.Module], Callable[..., Tensor]] = {}
    for block in network.modules():
        kind = type(block)
        if isinstance(block, BLOCKS) and block._compiled_call_impl is None:  # not compiled yet
            if kind not in calls:
                calls[kind] = _block_call(torch.compile(kind.forward, **settings), dynamo.maybe_mark_dynamic)
            # The attribute that `nn.Module.compile` sets, which torch leaves out of copies and files.
            block._compiled_call_impl = MethodType(calls[kind], block)


def _block_call(compiled: Callable[..., Tensor], mark_dynamic: Callable[..., None]) -> Callable[..., Tensor]:
    """Returns a block's `__call__` that runs the compiled forward pass, or the plain one if the block has hooks."""

    def call(block: nn.Module, *inputs: Any) -> Tensor:
        hooked = "forward" in vars(block) or block._forward_hooks or block._forward_pre_hooks
        if hooked or torch.compiler.is_compiling():  # the latter: the block is part of a larger compiled module
            out: Tensor = block._call_impl(*inputs)
            return out
        for x in inputs:
            for y in x if isinstance(x, tuple) else (x,):
                if isinstance(y, Tensor):  # or torch would assume that sides which are equal now stay equal
                    mark_dynamic(y, list(range(y.dim())))
        return compiled(block, *inputs)

    return call

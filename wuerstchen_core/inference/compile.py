"""`torch.compile`, where torch can: it needs a C++ compiler, on a GPU Triton, and nobody has to have them."""

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
GRAPHS = 64  # of a kind of block: by its width, what joins it, its dtype, and what torch tells apart
OPTIONS = ("backend", "fullgraph", "mode", "options")
LAST_WORDS = 150  # characters of torch's


def can_compile(device: Any, **options: Any) -> bool:
    """Try it on next to nothing: what it needs differs with the device and the system, and with its `options`.

    Where it fails, the log says why. ValueError where torch does not know the options.
    """
    for name in options:
        if name not in OPTIONS:
            why = ": its graphs serve all sizes" if name == "dynamic" else ""
            known = ", ".join(OPTIONS)
            raise ValueError(f"compile takes no {name!r}{why}; of torch.compile's options it takes {known}")
    try:
        torch.compile(_trial)  # fails where this torch can't compile on this system or for this Python
        try:
            compiled = torch.compile(_trial, **options)
        except (RuntimeError, TypeError, AttributeError) as error:
            given = ", ".join(f"{name}={shorten(repr(value), 40)}" for name, value in options.items())
            raise ValueError(f"torch.compile refuses {given}: {_words(error)}") from error
        compiled(torch.zeros(8, device=device))
    except (RuntimeError, OSError) as error:  # what its compilers raise, and a folder that they can't write into
        logger.warning("torch.compile does not work here, the networks run without it: %s", _words(error))
        return False
    return True


def _trial(x: Tensor) -> Tensor:
    return x + 1


def _words(error: Exception) -> str:
    return shorten(str(error), LAST_WORDS)


def compile_network(network: nn.Module, **options: Any) -> None:
    """Let torch compile a denoiser's blocks when they are first called; `options` are `torch.compile`'s.

    Blocks that are alike share their graphs, so that a prior of 32 repetitions compiles as quickly as one of 1: as a
    whole it would take eight times as long. A graph serves all sizes and batches, but for what torch itself
    tells apart: a single picture from several, and on a CPU which convolution is the quickest.

    A block with hooks runs as it is; torch does not see hooks that a block's inner layers get after its first call.
    Copies of the network are not compiled.
    """
    import torch._dynamo as dynamo  # takes a second, which only those shall pay who compile

    told = {"dynamic": True, **options}
    if "recompile_limit" in signature(torch.compile).parameters:
        told["recompile_limit"] = GRAPHS
    else:  # an older torch has one limit for all
        dynamo.config.cache_size_limit = max(dynamo.config.cache_size_limit, GRAPHS)
    calls: dict[type[nn.Module], Callable[..., Tensor]] = {}
    for block in network.modules():
        kind = type(block)
        if isinstance(block, BLOCKS) and block._compiled_call_impl is None:  # not a second time
            if kind not in calls:
                calls[kind] = _call(torch.compile(kind.forward, **told), dynamo.maybe_mark_dynamic)
            # Where `nn.Module.compile` puts it, too: torch keeps it out of copies and files.
            block._compiled_call_impl = MethodType(calls[kind], block)


def _call(compiled: Callable[..., Tensor], mark: Callable[..., None]) -> Callable[..., Tensor]:
    """What calling a block does."""

    def call(block: nn.Module, *given: Any) -> Tensor:
        changed = "forward" in vars(block) or block._forward_hooks or block._forward_pre_hooks
        if changed or torch.compiler.is_compiling():  # which compiles the block as a part of something else
            out: Tensor = block._call_impl(*given)
            return out
        for x in given:
            for y in x if isinstance(x, tuple) else (x,):
                if isinstance(y, Tensor):  # else sides that happen to be equal would have to stay equal
                    mark(y, list(range(y.dim())))
        return compiled(block, *given)

    return call

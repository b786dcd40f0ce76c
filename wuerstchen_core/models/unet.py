"""The U-Net that Stage B of v1 and of v2 share: levels of blocks, down and up again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ..kernels.mlp import MappedLatents
from .attention import AttnBlock
from .init import init_blocks
from .layers import ChannelNorm, EarlySkipResBlock, FeedForwardBlock, ResBlock, TimestepBlock


class UNetParams(Protocol):
    """The sizes of the levels, one entry a level from fine to coarse."""

    @property
    def c_r(self) -> int: ...
    @property
    def c_cond(self) -> int: ...
    @property
    def c_hidden(self) -> tuple[int, ...]: ...
    @property
    def nhead(self) -> tuple[int, ...]: ...
    @property
    def blocks(self) -> tuple[int, ...]: ...
    @property
    def level_config(self) -> tuple[str, ...]: ...
    @property
    def kernel_size(self) -> int: ...
    @property
    def self_attn(self) -> bool: ...
    @property
    def dropout(self) -> float: ...


class UNet(nn.Module):
    """Levels of blocks; how tokens enter and leave them is the subclass's."""

    down_blocks: nn.ModuleList
    up_blocks: nn.ModuleList

    def add_levels(
        self, p: UNetParams, c_injected: tuple[int, ...], *, v1: bool, operations: Any, **factory: Any
    ) -> None:
        """Build both ways; `c_injected` channels join every convolution of a level.

        `v1`: skips join before the convolution, and attention has the original's names.
        """
        levels = range(len(p.c_hidden))
        convolution = EarlySkipResBlock if v1 else ResBlock

        def blocks(level: int, c_skip: int) -> nn.ModuleList:
            """The blocks of one level; the first convolution also takes `c_skip` channels of the way down."""
            c, out = p.c_hidden[level], nn.ModuleList()
            for repeat in range(p.blocks[level]):
                for position, kind in enumerate(p.level_config[level]):
                    ops = {"operations": operations, **factory}
                    if kind == "C":
                        extra = c_injected[level] + (c_skip if repeat == position == 0 else 0)
                        out.append(convolution(c, extra, p.kernel_size, p.dropout, **ops))
                    elif kind == "T":
                        out.append(TimestepBlock(c, p.c_r, **ops))
                    elif kind == "A":
                        out.append(AttnBlock(c, p.c_cond, p.nhead[level], p.self_attn, p.dropout, v1, **ops))
                    elif kind == "F":
                        out.append(FeedForwardBlock(c, p.dropout, **ops))
                    else:
                        raise ValueError(f"block kind {kind!r} is unknown: a level is made of C, T, A and F")
            return out

        self.down_blocks = nn.ModuleList()
        for i in levels:
            level = nn.ModuleList()
            if i > 0:
                down = operations.Conv2d(p.c_hidden[i - 1], p.c_hidden[i], kernel_size=2, stride=2, **factory)
                level.append(nn.Sequential(ChannelNorm(), down))
            level.extend(blocks(i, c_skip=0))
            self.down_blocks.append(level)
        self.up_blocks = nn.ModuleList()
        for i in reversed(levels):
            level = blocks(i, c_skip=p.c_hidden[i] if i < levels[-1] else 0)
            if i > 0:
                up = operations.ConvTranspose2d(p.c_hidden[i], p.c_hidden[i - 1], kernel_size=2, stride=2, **factory)
                level.append(nn.Sequential(ChannelNorm(), up))
            self.up_blocks.append(level)

    def init_levels(self, depth: int) -> None:
        """The original's initialisation of the blocks; `depth` is how often levels repeat their patterns, in all."""
        for level in (*self.down_blocks, *self.up_blocks):
            init_blocks(level, depth)

    def run_levels(
        self,
        x: Tensor,
        time: Tensor,
        cond: Tensor,
        inject: Callable[[int, tuple[int, int]], MappedLatents | None] = lambda *_: None,
    ) -> Tensor:
        """Down and up again: x [B, c_hidden[0], H, W], time embeddings [B, c_r], conditioning [B, M, c_cond].

        `inject(i, size)` gives what joins every convolution of pass i (down, then up), or None.
        """
        depth = len(self.down_blocks)
        sizes = [(x.shape[-2] >> i, x.shape[-1] >> i) for i in range(depth)]
        skips: list[Tensor] = []
        for i, blocks in enumerate(self.down_blocks):
            x = _run(blocks, x, time, cond, inject(i, sizes[i]), None)
            skips.insert(0, x)
        for i, blocks in enumerate(self.up_blocks):
            injected = inject(depth + i, sizes[depth - 1 - i])
            x = _run(blocks, x, time, cond, injected, skips[i] if i > 0 else None)
        return x


def _run(
    blocks: Any, x: Tensor, time: Tensor, cond: Tensor, injected: MappedLatents | None, skip: Tensor | None
) -> Tensor:
    """Run one level; `injected` joins every ResBlock, `skip` (from the way down) only the first."""
    for block in blocks:
        if isinstance(block, ResBlock):
            x, skip = block(x, skip, injected), None
        elif isinstance(block, AttnBlock):
            x = block(x, cond)
        elif isinstance(block, TimestepBlock):
            x = block(x, time)
        else:  # feed-forward, or the change of resolution between two levels
            x = block(x)
    return x

"""The U-Net of Stage B in both releases: levels of blocks from fine to coarse and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..kernels.mlp import MappedLatents
from .attention import AttnBlock
from .init import init_blocks, xavier_init
from .layers import ChannelNorm, EarlySkipResBlock, FeedForwardBlock, ResBlock, TimestepBlock, channels_last


class UNetParams:
    """The sizes that both releases have; tuples have one entry per level, from fine to coarse.

    `level_config` is the pattern of blocks that a level repeats: C(onvolution), T(ime), A(ttention), F(eed-forward).
    """

    c_r: int  # width of the time embedding
    patch_size: int
    c_cond: int
    c_hidden: tuple[int, ...]
    nhead: tuple[int, ...]
    blocks: tuple[int, ...]  # repeats of the pattern
    level_config: tuple[str, ...]
    kernel_size: int
    self_attn: bool
    dropout: float

    @property
    def multiple(self) -> int:
        """The sides of the input must be multiples of this."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)


class UNet(nn.Module):
    """The layers that both releases have; subclasses add how the input is embedded and conditioned."""

    params: Any

    def build(
        self, c_in: int, c_out: int, c_injected: tuple[int, ...], *, v1: bool, operations: Any, **factory: Any
    ) -> None:
        """Adds the layers from c_in to c_out channels; `c_injected` channels join every convolution of a level.

        `v1`: skip connections join before the convolution, and attention has the original's parameter names.
        """
        p, last = self.params, len(self.params.c_hidden) - 1
        ops = {"operations": operations, **factory}
        convolution = EarlySkipResBlock if v1 else ResBlock

        def blocks(level: int, c_skip: int) -> nn.ModuleList:
            """Returns the blocks of one level; the first convolution also takes the skip connection's channels."""
            c, out = p.c_hidden[level], nn.ModuleList()
            for repeat in range(p.blocks[level]):
                for position, kind in enumerate(p.level_config[level]):
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
                        raise ValueError(f"level_config has an unknown block kind {kind!r}: use C, T, A or F")
            return out

        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(p.patch_size),
            operations.Conv2d(c_in * p.patch_size**2, p.c_hidden[0], kernel_size=1, **factory),
            ChannelNorm(),
        )
        self.down_blocks = nn.ModuleList()
        for i in range(last + 1):
            level = nn.ModuleList()
            if i > 0:
                down = operations.Conv2d(p.c_hidden[i - 1], p.c_hidden[i], kernel_size=2, stride=2, **factory)
                level.append(nn.Sequential(ChannelNorm(), down))
            self.down_blocks.append(level.extend(blocks(i, c_skip=0)))
        self.up_blocks = nn.ModuleList()
        for i in range(last, -1, -1):
            level = blocks(i, c_skip=p.c_hidden[i] if i < last else 0)
            if i > 0:
                up = operations.ConvTranspose2d(p.c_hidden[i], p.c_hidden[i - 1], kernel_size=2, stride=2, **factory)
                level.append(nn.Sequential(ChannelNorm(), up))
            self.up_blocks.append(level)
        self.clf = nn.Sequential(
            ChannelNorm(),
            operations.Conv2d(p.c_hidden[0], c_out * p.patch_size**2, kernel_size=1, **factory),
            nn.PixelShuffle(p.patch_size),
        )

    def init_unet(self, mappers: Iterable[Any]) -> None:
        """Initialises the weights as the original does before training; `mappers` map the conditioning."""
        self.apply(xavier_init)
        for layer in mappers:
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].get_parameter("weight"), 0.02)
        nn.init.zeros_(self.clf[1].get_parameter("weight"))
        for level in (*self.down_blocks, *self.up_blocks):
            init_blocks(level, depth=sum(self.params.blocks))

    def check_size(self, x: Tensor) -> None:
        """Raises ValueError if a side of x [B, ..., H, W] is not a multiple of `params.multiple`."""
        multiple, (height, width) = self.params.multiple, x.shape[-2:]
        if height % multiple or width % multiple:
            raise ValueError(
                f"Stage B's input is {width}x{height}: both sides must be multiples of {multiple} "
                f"({multiple * 4} pixels)"
            )

    def run(
        self,
        x: Tensor,
        time: Tensor,
        cond: Tensor,
        inject: Callable[[int, tuple[int, int]], MappedLatents | None] = lambda *_: None,
    ) -> Tensor:
        """x [B, c_in, H, W] to [B, c_out, H, W], given time embeddings [B, c_r] and conditioning [B, M, c_cond].

        `inject(i, size)` returns what joins every convolution of level i (down, then up), or None.
        """
        x = self.embedding[0](x)
        x = self.embedding[2](self.embedding[1](channels_last(x)))  # [B, c_hidden[0], H / patch_size, W / patch_size]
        depth = len(self.down_blocks)
        sizes = [(x.shape[-2] >> i, x.shape[-1] >> i) for i in range(depth)]
        skips: list[Tensor] = []
        for i, blocks in enumerate(self.down_blocks):
            x = _run_level(blocks, x, time, cond, inject(i, sizes[i]), None)
            skips.insert(0, x)
        for i, blocks in enumerate(self.up_blocks):
            injected = inject(depth + i, sizes[depth - 1 - i])
            x = _run_level(blocks, x, time, cond, injected, skips[i] if i > 0 else None)
        return self.clf(x)


def _run_level(
    blocks: Any, x: Tensor, time: Tensor, cond: Tensor, injected: MappedLatents | None, skip: Tensor | None
) -> Tensor:
    """Runs one level; `injected` joins every ResBlock, `skip` (from the way down) only the first."""
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
